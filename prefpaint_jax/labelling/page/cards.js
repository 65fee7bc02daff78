// The DOM of an item: the prompt, and a card for each candidate.

import { addresses, load, outline } from "./images.js";
import { same } from "./sheet.js";

export const letter = (index) => String.fromCharCode(65 + (index % 26)).repeat(1 + index / 26);

/** Returns an element with properties, attributes ("aria-…", "role", "tabindex") and children. */
export function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name in element) element[name] = value;
    else element.setAttribute(name, value);
  }
  element.append(...children);
  return element;
}

/**
 * Returns the elements of an item, whose images are decoded, so that its layout is final.
 *
 * `on` has the handlers toggle(), show(candidate), score(cell, score), focus(cell) and
 * choose(candidate).
 */
export async function itemElements(item, state, on, onLost) {
  const [known, mask, ...images] = await Promise.all(
    addresses(item).map((url) => load(url, onLost)),
  );
  const { svg, centre } = outline(mask);
  const incomplete = () => {
    const copy = known.cloneNode();
    Object.assign(copy, { className: "known", alt: "" });
    return [copy, svg.cloneNode(true)];
  };
  const prompt = promptElement(item, frame(incomplete()), on);
  const cards = images.map((image, index) => {
    image.alt = `Candidate ${letter(index)}`;
    image.className = "candidate";
    const card = make("section", { className: "card", "aria-label": `Candidate ${letter(index)}` });
    const figure = make("div", { className: "figure" }, frame([image, ...incomplete()]));
    const judged = state.mode === "pairs" ? choice(item, index, on) : scales(state, index, on);
    card.append(figure, judged);
    return card;
  });
  const tabs = make("nav", { className: "tabs", "aria-label": "Candidates" });
  if (state.mode === "scores") {
    tabs.append(
      ...cards.map((_, index) =>
        make(
          "button",
          { type: "button", tabIndex: -1, onclick: () => on.show(index) },
          letter(index),
          make("span", { className: "dots", "aria-hidden": "true" }, ...dots(state)),
        ),
      ),
    );
  }
  const row = make("div", { className: "cards" }, ...cards);
  return { prompt, tabs, row, known, centre };
}

const dots = (state) => state.criteria.map(() => make("i"));

function frame(layers) {
  return make("div", { className: "frame" }, make("div", { className: "view" }, ...layers));
}

function promptElement(item, incomplete, on) {
  const figure = make("div", { className: "figure" }, incomplete);
  incomplete.setAttribute("role", "img");
  incomplete.setAttribute("aria-label", "Incomplete image; the missing part is outlined");
  const text = item.text
    ? make("blockquote", { textContent: item.text })
    : make("p", { className: "note", textContent: "The outlined part was missing." });
  text.dir = "auto";
  if (item.text) text.tabIndex = 0; // a long text scrolls, also by keys
  figure.addEventListener("click", on.toggle);
  return make("section", { className: "prompt", "aria-label": "Prompt" }, figure, text);
}

/** The scales of a candidate: a group that takes the focus, with a button for each score. */
function scales(state, candidate, on) {
  const name = letter(candidate);
  const groups = state.criteria.map((criterion, index) => {
    const label = criterion[0].toUpperCase() + criterion.slice(1);
    const buttons = Array.from({ length: state.most + 1 }, (_, score) =>
      make("button", {
        type: "button",
        role: "radio",
        "aria-checked": "false",
        "aria-label": `${label} ${score}`,
        tabIndex: -1,
        textContent: score,
        onclick: () => on.score({ candidate, criterion: index }, score),
      }),
    );
    const group = make(
      "div",
      {
        className: "scale",
        role: "radiogroup",
        tabIndex: 0,
        "aria-label": `Candidate ${name}, ${criterion}`,
      },
      ...buttons,
    );
    group.addEventListener("focus", () => on.focus({ candidate, criterion: index }));
    return make("div", { className: "row" }, make("span", { textContent: label }), group);
  });
  return make("div", { className: "scores" }, ...groups);
}

/** The button that chooses a candidate of a pair. */
function choice(item, candidate, on) {
  const key = make("kbd", { textContent: candidate ? "→" : "←" });
  const label = make("span", { textContent: `${letter(candidate)} is better` });
  return make(
    "button",
    {
      type: "button",
      className: "choice",
      "aria-pressed": String(item.answer?.better === item.candidates[candidate].id),
      onclick: () => on.choose(candidate),
    },
    ...(candidate ? [label, key] : [key, label]),
  );
}

/** Marks the scores of a sheet, and the current cell. */
export function mark(row, tabs, sheet, current) {
  for (const cell of sheet.cells()) {
    const score = sheet.of(cell);
    const group = row.children[cell.candidate].querySelectorAll(".scale")[cell.criterion];
    group.parentElement.classList.toggle("current", same(cell, current));
    [...group.children].forEach((button, value) => {
      button.setAttribute("aria-checked", String(value === score));
      button.classList.toggle("below", value < score); // not if there is none
    });
    const dot = tabs.children[cell.candidate].querySelectorAll("i")[cell.criterion];
    dot.classList.toggle("scored", score !== undefined);
  }
  [...tabs.children].forEach((tab, candidate) => {
    tab.setAttribute("aria-current", String(candidate === current.candidate));
  });
}
