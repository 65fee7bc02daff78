// The keyboard: what a key does in each mode.

import { isZoomed, pan, toggleZoom, zoomBy } from "./zoom.js";

const ARROWS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
const STEP = 0.15; // of a frame, that an arrow moves a zoomed image

/**
 * Listens to the keys of the page.
 *
 * `page` has view() ("item", "done", ...), mode(), most(), score(value), move(candidates, criteria),
 * submit(), choose(index or null), back(), forward(), toggle(), guidelines().
 */
export function listenToKeys(page) {
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (document.querySelector("dialog[open]") || event.target.closest("input")) return;
    if (event.key === "Enter" && event.target.closest("button")) return; // presses the button
    if (act(page, event)) event.preventDefault();
  });
}

/** Returns whether the key did something. */
function act(page, { key, repeat }) {
  const view = page.view();
  if (key === "?") return done(page.guidelines);
  if ((key === "Backspace" || key === "u" || key === "U") && view !== "sign-in") {
    return repeat || done(page.back);
  }
  if (view !== "item") return false;
  if (key === "t" || key === "T") return repeat || done(page.toggle);
  if (key === "z" || key === "Z") return repeat || done(toggleZoom);
  if (key === "+") return done(() => zoomBy(1.5));
  if (key === "-") return done(() => zoomBy(1 / 1.5));
  if (key === "Escape") return done(isZoomed() ? toggleZoom : page.forward);
  const arrow = ARROWS[key];
  if (arrow && isZoomed()) return done(() => pan(STEP * arrow[0], STEP * arrow[1]));
  return page.mode() === "pairs" ? compare(page, key, repeat) : judge(page, key, arrow);
}

function judge(page, key, arrow) {
  if (arrow) return done(() => page.move(...arrow));
  if (key === "Enter") return done(page.submit);
  if (/^\d$/.test(key) && Number(key) <= page.most()) return done(() => page.score(Number(key)));
  return false;
}

/** A key that is held answers one pair only. */
function compare(page, key, repeat) {
  if (key === "Enter") return repeat || done(page.forward); // keeps the answer
  const choices = { ArrowLeft: 0, ArrowRight: 1, ArrowDown: null, "=": null };
  if (!(key in choices)) return false;
  return repeat || done(() => page.choose(choices[key]));
}

function done(action) {
  action();
  return true;
}
