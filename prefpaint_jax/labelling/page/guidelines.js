// Drawn examples of the guidelines: what a score looks like for each criterion.

const SVG = "http://www.w3.org/2000/svg";
const ANCHORS = {
  structure: {
    0: "nothing makes sense",
    2: "broken or misplaced things",
    4: "possible, but something is wrong",
    6: "a mistake if you search",
    7: "no mistake",
  },
  texture: {
    0: "flat, or noise",
    2: "blurred, another material",
    4: "right material, wrong scale",
    6: "slightly off in tone",
    7: "as the surroundings",
  },
  overall: {
    0: "useless",
    2: "wrong at first sight",
    4: "passes a quick look",
    6: "convincing",
    7: "a photograph",
  },
};
const DRAW = { structure: temple, texture: wall, overall: landscape };
const HOLE = [66, 6, 48, 78]; // x, y, width, height

/** Fills the lists `<ol data-criterion>` of an element. */
export function drawExamples(element) {
  for (const list of element.querySelectorAll("ol[data-criterion]")) {
    const { criterion } = list.dataset;
    for (const [score, words] of Object.entries(ANCHORS[criterion])) {
      const entry = document.createElement("li");
      const number = document.createElement("b");
      number.textContent = score;
      entry.append(example(DRAW[criterion], Number(score), criterion), number, ` ${words}`);
      list.append(entry);
    }
  }
}

/** Draws the whole scene, the filling on top of it in the hole, and the outline of the hole. */
function example(draw, score, criterion) {
  const svg = shape("svg", { viewBox: "0 0 120 90", "aria-hidden": "true" });
  const clip = `hole-${criterion}-${score}`;
  const [x, y, width, height] = HOLE;
  const filling = shape("g", { "clip-path": `url(#${clip})` }, draw(score));
  svg.append(
    shape("clipPath", { id: clip }, [shape("rect", { x, y, width, height })]),
    ...draw(7),
    filling,
    shape("rect", { x, y, width, height, class: "hole under" }),
    shape("rect", { x, y, width, height, class: "hole over" }),
  );
  return svg;
}

function shape(tag, attributes, children = []) {
  const element = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

const rect = (x, y, width, height, fill) => shape("rect", { x, y, width, height, fill });
const path = (d, fill, more = {}) => shape("path", { d, fill, ...more });

function temple(score) {
  const sky = rect(0, 0, 120, 90, "#bcd3e2");
  const ground = rect(0, 74, 120, 16, "#a89b78");
  if (score === 0) {
    const lumps = ["M66 60q10 -30 26 -18t30 -20v70h-56z", "M70 30q14 -18 22 4t-18 14z"];
    return [sky, path(lumps[0], "#8d8f7d"), path(lumps[1], "#e6dcc0")];
  }
  const column = (x, top, lean = 0) => [
    path(`M${x + lean} ${top}h9l${-lean} ${68 - top}h-9z`, "#efe6cd"),
    path(`M${x + 6 + lean} ${top}h3l${-lean} ${68 - top}h-3z`, "#c9bc98"),
  ];
  const steps = [rect(6, 68, 108, 3.5, "#e3d8ba"), rect(2, 71.5, 116, 3.5, "#cfc29f")];
  const roof = (shift, apex) => [
    path(`M4 ${30 + shift}L60 ${apex}L116 ${30 + shift}z`, "#e8ddc0"),
    rect(6, 30 + shift, 108, 6, "#d6c9a6"),
  ];
  const left = [12, 33, 54].flatMap((x) => column(x, 36));
  const right = {
    7: [...roof(0, 10), ...column(75, 36), ...column(97, 36)],
    6: [...roof(0, 10), ...column(75, 36), ...column(95, 39)],
    4: [...roof(0, 10), ...column(97, 36)],
    2: [...roof(11, 22), ...column(72, 47, 9), ...column(103, 47, -7)],
  }[score];
  return [sky, ground, ...steps, ...right, ...(score === 2 ? [] : left)];
}

function wall(score) {
  if (score === 0) return [rect(0, 0, 120, 90, "#a5786a")];
  const scale = score === 4 ? 0.5 : 1;
  const tones = ["#a8624d", "#9c5641", "#b06c56", "#955040"];
  const shapes = [rect(0, 0, 120, 90, "#cdbfae")];
  const [width, height] = [20 * scale, 10 * scale];
  for (let row = 0; row * height < 90; row++) {
    for (let i = -1; i * width < 120; i++) {
      const x = i * width + (row % 2) * (width / 2);
      const gap = 1.4 * scale;
      const tone = tones[(row * 7 + i * 5 + 35) % tones.length];
      shapes.push(rect(x, row * height, width - gap, height - gap, tone));
    }
  }
  if (score === 6) shapes.push(rect(0, 0, 120, 90, "#ffe9c82b"));
  if (score !== 2) return shapes;
  const blur = shape("filter", { id: "blur" }, [shape("feGaussianBlur", { stdDeviation: 3 })]);
  return [blur, shape("g", { filter: "url(#blur)" }, shapes)];
}

function landscape(score) {
  if (score === 0) return [rect(0, 0, 120, 90, "#9a9a94"), rect(80, 30, 22, 30, "#d06a8c")];
  const sky = rect(0, 0, 120, 90, score === 2 ? "#d8d5c4" : "#c3d9e6");
  const far = path("M0 46q30 -22 58 -6t62 -10v60h-120z", "#8fa9a0");
  const near = path("M0 58q40 -12 70 0t50 -4v40h-120z", "#7f9a5e");
  const river = path("M18 90q24 -14 52 -16t32 -18h5q6 22 -30 24t-34 10z", "#b4d0de");
  const tree = (x, y, tone = "#54713f") => [
    rect(x - 1, y, 2, 9, "#6b5238"),
    shape("ellipse", { cx: x, cy: y - 4, rx: 6, ry: 8, fill: tone }),
  ];
  const trees = [...tree(22, 50), ...tree(38, 54)];
  if (score === 2) {
    return [sky, path("M60 30h60v60h-60z", "#9db07e"), ...tree(92, 24), ...tree(106, 66, "#7b5a7d")];
  }
  if (score === 4) {
    return [sky, far, path("M60 61h60v30h-60z", "#86a065"), ...tree(88, 50), ...tree(101, 50)];
  }
  const last = score === 6 ? tree(86, 49, "#6c8757") : tree(86, 49);
  return [sky, far, near, river, ...trees, ...last];
}
