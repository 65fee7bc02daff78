// The page: an image, its mask, a job, and the samples.

import { Mask } from "./canvas.js";
import { showSamples } from "./samples.js";

const $ = (id) => document.getElementById(id);
const wait = (milliseconds) => new Promise((resolve) => setTimeout(resolve, milliseconds));
const SMALL = 128; // an image with shorter sides shows its pixels

if (location.hash.length > 1) sessionStorage.setItem("token", location.hash.slice(1));
let state, image, job, isRunning = false;

async function call(path, options = {}) {
  const token = sessionStorage.getItem("token");
  const headers = { ...options.headers, ...(token && { Authorization: `Bearer ${token}` }) };
  const answer = await fetch(path, { ...options, headers }).catch(() => {
    throw Object.assign(new Error("The server does not answer."), { isLost: true });
  });
  if (!answer.ok) throw new Error(await answer.text());
  return answer.json();
}

function say(problem) {
  $("problem").textContent = problem;
  $("problem").hidden = !problem;
}

const mask = new Mask($("mask"), $("stage"), $("cursor"), () => {
  $("undo").disabled = isRunning || !mask.strokes.length;
  const isEmpty = mask.isEmpty();
  $("clear").disabled = isRunning || isEmpty;
  $("fill").disabled = isEmpty || isRunning;
  $("hint").hidden = !isEmpty;
});

// ------------------------------------------------------------------------------------------- image
function loaded(source) {
  return new Promise((resolve, reject) => {
    const element = new Image();
    element.onload = () => resolve(element);
    const gone = "The image is no longer on the server; choose it again.";
    element.onerror = () => reject(new Error(gone));
    element.src = source;
  });
}

async function open(chosen) {
  say("");
  const shown = await loaded(`/images/${chosen.image}`);
  const drawn = chosen.mask && (await loaded(`/images/${chosen.mask}`));
  image = chosen;
  $("picture").src = shown.src;
  const ratio = chosen.width / chosen.height;
  for (const id of ["stage", "compare", "ghost"]) {
    $(id).style.aspectRatio = ratio;
    $(id).style.width = `min(100%, 60vh * ${ratio})`;
    $(id).classList.toggle("pixels", Math.min(chosen.width, chosen.height) < SMALL);
  }
  const size = ([width, height]) => `${width}×${height}`;
  const [whole, part, works] = [chosen.full, [chosen.width, chosen.height], chosen.works].map(size);
  const notes = [
    whole !== part && `The middle ${part} of ${whole} pixels: models are compiled for few shapes.`,
    works !== part && `The model works at ${works} pixels.`,
  ].filter(Boolean);
  $("note").textContent = notes.join(" ");
  $("note").hidden = !notes.length;
  $("start").hidden = true;
  $("desk").hidden = $("another").hidden = false;
  $("shown").hidden = true;
  $("empty").hidden = false;
  mask.reset(shown.naturalWidth, shown.naturalHeight, drawn);
  scrollTo(0, 0);
}

async function take(file) {
  if (!file || isRunning) return;
  say("");
  document.body.classList.add("busy");
  try {
    if (file.size > 20 * 2 ** 20) throw new Error(`${file.name} has more than 20 MB; reduce it.`);
    const headers = { "Content-Type": "application/octet-stream" };
    await open(await call("/api/images", { method: "POST", body: file, headers }));
  } catch (error) {
    say(error.message);
  }
  document.body.classList.remove("busy");
}

function restart() {
  if (isRunning) return;
  $("start").hidden = false;
  $("desk").hidden = $("another").hidden = true;
  say("");
}

// --------------------------------------------------------------------------------------------- job
function describe({ state: phase, ahead, stage, done, total }) {
  if (phase === "waiting") {
    return ahead === 1 ? "One fill before yours" : `${ahead} fills before yours`;
  }
  const [what, label] = stage.split(" ");
  if (what === "compiling") return "Compiling: the first fill of this kind takes longer";
  if (what === "painting") {
    const steps = total / Object.keys(state.policies).length;
    const step = done ? ((done - 1) % steps) + 1 : 0;
    return `Painting${label === "model" ? "" : `, ${label}`}: step ${step} of ${steps}`;
  }
  return { scoring: "Scoring", saving: "Saving" }[what] ?? "Starting";
}

function showProgress(now) {
  $("stage_text").textContent = describe(now);
  const seconds = Math.round(now.seconds);
  const expected = now.expected && !now.compiles ? ` of about ${Math.ceil(now.expected)} s` : " s";
  $("time").textContent = now.state === "running" ? seconds + expected : "";
  if (now.state === "running" && !now.stage.startsWith("compiling") && now.total) {
    $("bar").value = now.done / now.total;
  } else {
    $("bar").removeAttribute("value");
  }
}

function run(isNow) {
  isRunning = mask.locked = isNow;
  $("progress").hidden = !isNow;
  $("settings").classList.toggle("away", isNow);
  $("stage").classList.toggle("running", isNow);
  $("another").disabled = isNow;
  mask.changed();
}

async function follow() {
  for (;;) {
    try {
      const now = await call(`/api/jobs/${job}`);
      say("");
      // A compilation ends before the job does; the page need not wait for it.
      const isOver = !["waiting", "running"].includes(now.state);
      if (isOver || now.stage === "cancelling") return now;
      showProgress(now);
    } catch (error) {
      if (!error.isLost) throw error;
      say("The server does not answer; trying again.");
    }
    await wait(300);
  }
}

async function fill() {
  if (isRunning || mask.isEmpty()) return;
  const original = $("picture").src;
  say("");
  job = null;
  run(true);
  showProgress({ state: "running", stage: "", seconds: 0 });
  try {
    const body = JSON.stringify({
      image: image.image,
      mask: await mask.encode(image.width, image.height),
      steps: $("steps").valueAsNumber,
      samples: Number(document.querySelector("[name=samples]:checked").value),
      seed: $("seed").valueAsNumber,
      text: state.texts ? $("text").value : "",
    });
    const headers = { "Content-Type": "application/json" };
    job = (await call("/api/jobs", { method: "POST", body, headers })).job;
    const over = await follow();
    if (over.state === "failed") throw new Error(over.error);
    if (over.state === "done") {
      $("empty").hidden = true;
      $("shown").hidden = false;
      showSamples(over.result, original);
      if (innerWidth < 960) $("results").scrollIntoView({ behavior: "smooth" });
    }
  } catch (error) {
    say(error.message);
  }
  run(false);
}

// ------------------------------------------------------------------------------------------ events
function listen() {
  $("drop").onclick = () => $("file").click();
  $("file").onchange = () => take($("file").files[0]).then(() => ($("file").value = ""));
  $("another").onclick = restart;
  $("undo").onclick = () => mask.undo();
  $("clear").onclick = () => mask.clear();
  $("size").oninput = () => (mask.size = $("size").valueAsNumber);
  $("tool").onchange = (event) => (mask.tool = event.target.value);
  $("steps").oninput = () => ($("steps_shown").textContent = $("steps").value);
  $("dice").onclick = () => ($("seed").value = Math.floor(Math.random() * 1e6));
  $("settings").onsubmit = (event) => {
    event.preventDefault();
    fill();
  };
  $("cancel").onclick = () => job && call(`/api/jobs/${job}`, { method: "DELETE" }).catch(() => {});
  document.addEventListener("paste", (event) => take(event.clipboardData.files[0]));
  document.addEventListener("dragover", (event) => {
    event.preventDefault();
    document.body.classList.add("over");
  });
  for (const name of ["drop", "dragleave"]) {
    document.addEventListener(name, (event) => {
      event.preventDefault();
      if (name === "drop" || !event.relatedTarget) document.body.classList.remove("over");
      if (name === "drop") take(event.dataTransfer.files[0]);
    });
  }
  document.addEventListener("keydown", (event) => {
    if (event.target.matches("[type=text], [type=number]") || $("desk").hidden) return;
    const key = event.key.toLowerCase();
    const tool = { b: "brush", e: "eraser", r: "box" }[key];
    if ((event.ctrlKey || event.metaKey) && key === "z") {
      event.preventDefault();
      mask.undo();
    } else if (event.ctrlKey || event.metaKey || event.altKey) {
      return;
    } else if (tool) {
      document.querySelector(`[name=tool][value=${tool}]`).click();
    } else if (key === "[" || key === "]") {
      $("size").valueAsNumber += key === "]" ? 2 : -2;
      mask.size = $("size").valueAsNumber;
    }
  });
}

async function begin() {
  try {
    state = await call("/api/state");
  } catch (error) {
    return say(error.message);
  }
  const { aligned, base, model } = state.policies;
  $("models").textContent =
    (model ?? `${aligned} beside ${base}`) + (state.reward ? `, scored by ${state.reward}` : "");
  $("text_field").hidden = !state.texts;
  $("steps").value = $("steps_shown").textContent = state.defaults.steps;
  $("seed").value = state.defaults.seed;
  document.querySelector(`[name=samples][value="${state.defaults.samples}"]`).checked = true;
  for (const [index, example] of state.examples.entries()) {
    const button = document.createElement("button");
    const shown = Object.assign(new Image(), { src: `/images/${example.image}`, alt: "" });
    button.type = "button";
    button.ariaLabel = `Example ${index + 1}`;
    button.classList.toggle("pixels", Math.min(example.width, example.height) < SMALL);
    button.append(shown);
    button.onclick = () => open(example).catch((error) => say(error.message));
    $("examples").append(button);
  }
  $("start").hidden = false;
  listen();
}

begin();
