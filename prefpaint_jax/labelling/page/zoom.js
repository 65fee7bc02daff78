// One zoom for all images of an item: wheel, pinch, drag, double click and keys.

const MOST = 16;
const view = { zoom: 1, x: 0.5, y: 0.5 }; // x, y: the point of the image in the middle of a frame
let home = { x: 0.5, y: 0.5 }; // where a zoom by key begins
let stage;
let onChange;

/** Lets the frames in `element` zoom in step; `changed(zoom)` is told. */
export function zoomable(element, changed) {
  [stage, onChange] = [element, changed];
  stage.addEventListener("wheel", wheel, { passive: false });
  stage.addEventListener("dblclick", (event) => {
    const frame = event.target.closest(".frame");
    if (frame) zoomTo(view.zoom > 1 ? 1 : 3, pointIn(frame, event));
  });
  stage.addEventListener("pointerdown", drag);
  for (const kind of ["touchstart", "touchmove", "touchend"]) {
    stage.addEventListener(kind, touch, { passive: false });
  }
}

export const isZoomed = () => view.zoom > 1;

/** Shows the whole images; the next zoom by key begins at `point`. */
export function resetZoom(point) {
  home = point;
  zoomTo(1);
}

/** Zooms by a factor, at the middle of the frames. */
export function zoomBy(factor) {
  const first = view.zoom === 1;
  zoomTo(view.zoom * factor);
  if (first) Object.assign(view, home);
  apply();
}

export function toggleZoom() {
  if (isZoomed()) zoomTo(1);
  else zoomBy(3);
}

/** Moves by shares of a frame. */
export function pan(dx, dy) {
  view.x += dx / view.zoom;
  view.y += dy / view.zoom;
  apply();
}

/** Zooms so that `point`, a place in a frame from 0 to 1, keeps its pixel. */
function zoomTo(zoom, point = { x: 0.5, y: 0.5 }) {
  const next = Math.min(MOST, zoom < 1.05 ? 1 : zoom);
  view.x += (point.x - 0.5) * (1 / view.zoom - 1 / next);
  view.y += (point.y - 0.5) * (1 / view.zoom - 1 / next);
  view.zoom = next;
  apply();
}

function apply() {
  const margin = 0.5 / view.zoom; // the image covers its frame
  view.x = Math.min(1 - margin, Math.max(margin, view.x));
  view.y = Math.min(1 - margin, Math.max(margin, view.y));
  stage.style.setProperty("--zoom", view.zoom);
  stage.style.setProperty("--x", view.x);
  stage.style.setProperty("--y", view.y);
  stage.classList.toggle("zoomed", view.zoom > 1);
  onChange(view.zoom);
}

function pointIn(frame, at) {
  const box = frame.getBoundingClientRect();
  return { x: (at.clientX - box.left) / box.width, y: (at.clientY - box.top) / box.height };
}

function wheel(event) {
  const frame = event.target.closest(".frame");
  if (!frame || !(event.ctrlKey || isZoomed())) return; // ctrlKey: a pinch on a touch pad
  event.preventDefault();
  zoomTo(view.zoom * Math.exp(-event.deltaY / (event.ctrlKey ? 100 : 400)), pointIn(frame, event));
}

function drag(event) {
  const frame = event.target.closest(".frame");
  if (!frame || event.pointerType === "touch" || event.button !== 0 || !isZoomed()) return;
  event.preventDefault();
  const box = frame.getBoundingClientRect();
  const move = (moved) => pan(-moved.movementX / box.width, -moved.movementY / box.height);
  const end = () => {
    removeEventListener("pointermove", move);
    removeEventListener("pointerup", end);
    removeEventListener("pointercancel", end);
  };
  addEventListener("pointermove", move);
  addEventListener("pointerup", end);
  addEventListener("pointercancel", end);
}

let last = null; // of a gesture: frame, middle of the fingers, distance between them

function touch(event) {
  const fingers = [...event.touches];
  const frame = event.target.closest(".frame");
  const moves = frame && (fingers.length === 2 || (fingers.length === 1 && isZoomed()));
  if (!moves) {
    last = null;
    return;
  }
  const middle = pointIn(frame, {
    clientX: fingers.reduce((sum, finger) => sum + finger.clientX, 0) / fingers.length,
    clientY: fingers.reduce((sum, finger) => sum + finger.clientY, 0) / fingers.length,
  });
  const [a, b] = fingers;
  const apart = b ? Math.hypot(a.clientX - b.clientX, a.clientY - b.clientY) : 0;
  if (event.type === "touchmove") {
    event.preventDefault(); // no scrolling
    if (last && last.count === fingers.length) {
      if (apart) zoomTo((view.zoom * apart) / last.apart, middle);
      pan(last.middle.x - middle.x, last.middle.y - middle.y);
    }
  }
  last = { middle, apart, count: fingers.length };
}
