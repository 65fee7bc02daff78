// The samples of a job: one pair large with a slider, all of them small with their scores.

const $ = (id) => document.getElementById(id);
const NAMES = { aligned: "Aligned", base: "Base", model: "Sample", original: "Original" };
const score = (reward) => (reward === null ? "no score" : reward.toFixed(3));

let result, original, index;

export function showSamples(given, source) {
  [result, original] = [given, source];
  const main = result.policies[0];
  const hasBase = result.policies.length > 1;
  $("against").hidden = $("against_label").hidden = !hasBase;
  if (!hasBase) document.querySelector("[name=against][value=original]").checked = true;
  $("against").onchange = show;
  $("cut").oninput = () => $("compare").style.setProperty("--cut", `${$("cut").value}%`);
  $("tiles").replaceChildren(...main.shown.map((_, number) => tile(number)));
  $("summary").textContent = summary();
  $("summary").hidden = !$("summary").textContent;
  select(main.best ?? 0);
}

function make(name, properties = {}, ...children) {
  const element = Object.assign(document.createElement(name), properties);
  element.append(...children);
  return element;
}

// Base on the left, as in the large pair.
function tile(number) {
  const pair = [...result.policies].reverse().map(({ label, shown, rewards, best }) => {
    const isBest = best === number && shown.length > 1;
    const caption = make("span", { className: "score" });
    if (rewards) caption.append(`${isBest ? "★ " : ""}${score(rewards[number])}`);
    const picture = make("img", { src: `/images/${shown[number]}`, alt: NAMES[label] });
    return make("span", { className: `${label}${isBest ? " best" : ""}` }, picture, caption);
  });
  const button = make("button", { type: "button", className: "tile" }, ...pair);
  const scores = [...result.policies].reverse().map(
    ({ label, rewards, best }) =>
      rewards && `${NAMES[label]} ${score(rewards[number])}${best === number ? ", best" : ""}`,
  );
  button.ariaLabel = [`Sample ${number + 1}`, ...scores.filter(Boolean)].join(": ");
  button.classList.toggle("pixels", $("compare").classList.contains("pixels"));
  button.onclick = () => select(number);
  return button;
}

function summary() {
  const [aligned, base] = result.policies.map((policy) => policy.rewards);
  if (!aligned) return "";
  const star = aligned.length > 1 ? "★ highest score" : "";
  if (!base || [...aligned, ...base].includes(null)) return star;
  const wins = aligned.filter((reward, i) => reward > base[i]).length;
  const mean = (list) => score(list.reduce((a, b) => a + b) / list.length);
  const many =
    `Aligned scores higher in ${wins} of ${aligned.length} pairs: ` +
    `mean ${mean(aligned)}, base ${mean(base)}. ${star}.`;
  return aligned.length > 1 ? many : "";
}

function select(number) {
  index = number;
  [...$("tiles").children].forEach((one, i) => one.setAttribute("aria-pressed", i === index));
  show();
}

function show() {
  const [main, base] = result.policies;
  const against = document.querySelector("[name=against]:checked").value;
  const isBase = against === "base" && base;
  $("left").src = isBase ? `/images/${base.shown[index]}` : original;
  $("right").src = `/images/${main.shown[index]}`;
  $("left_tag").textContent = NAMES[isBase ? "base" : "original"];
  $("right_tag").textContent = NAMES[main.label];
  const count = main.shown.length;
  $("which").textContent = count > 1 ? `Sample ${index + 1} of ${count}` : `Seed ${result.seed}`;
  $("downloads").replaceChildren(
    "Download ",
    ...[...result.policies].reverse().map(({ label, files }) =>
      make("a", {
        href: `/images/${files[index]}`,
        download: `${label}_seed${result.seed}_${index + 1}.png`,
        textContent: base ? NAMES[label] : "PNG",
      }),
    ),
  );
}
