// Images of an item: loaded whole before they are shown, and the outline of the hole.

import { patient, Refused } from "./api.js";

const SVG = "http://www.w3.org/2000/svg";
const loaded = new Map(); // address -> {image: promise of a decoded <img>, onLost}

/**
 * Returns the promise of a decoded <img>, so that nothing moves when it is put on the page.
 *
 * The last call's `onLost` is told of failed attempts: an image that is loaded ahead fails silently
 * until its item is to be shown.
 */
export function load(url, onLost) {
  const entry = loaded.get(url) ?? {};
  entry.onLost = onLost;
  if (!loaded.has(url)) {
    loaded.set(url, entry);
    entry.image = decoded(url, (line) => entry.onLost(line));
    // The next item or attempt asks again.
    entry.image.catch(() => loaded.get(url) === entry && loaded.delete(url));
  }
  return entry.image;
}

async function decoded(url, onLost) {
  const blob = await patient(url, {}, (response) => response.blob(), onLost);
  const image = new Image();
  image.draggable = false;
  image.src = URL.createObjectURL(blob);
  try {
    await image.decode();
  } catch {
    throw new Refused(0, "the browser cannot read an image; tell the person who invited you");
  }
  return image;
}

/** Frees all images but those of the addresses, and ends the attempts to load them. */
export function keepOnly(urls) {
  for (const [url, entry] of loaded) {
    if (urls.includes(url)) continue;
    loaded.delete(url);
    entry.onLost = () => {
      throw new Refused(0, "the image is not needed");
    };
    entry.image.then(
      (old) => URL.revokeObjectURL(old.src),
      () => {},
    );
  }
}

/** Returns the addresses of an item's images. */
export function addresses(item) {
  return [item.known, item.mask, ...item.candidates.map((candidate) => candidate.image)];
}

/**
 * Returns an <svg> that outlines the white parts of a mask, in two tones that any image shows, and
 * the centre of these parts, from 0 to 1.
 */
export function outline(mask) {
  const { naturalWidth: width, naturalHeight: height } = mask;
  const missing = missingPixels(mask);
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  svg.setAttribute("preserveAspectRatio", "none");
  svg.setAttribute("aria-hidden", "true");
  const d = boundary(missing, width, height);
  for (const tone of ["under", "over"]) {
    const path = document.createElementNS(SVG, "path");
    path.setAttribute("d", d);
    path.setAttribute("class", tone);
    svg.append(path);
  }
  return { svg, centre: centre(missing, width, height) };
}

function centre(missing, width, height) {
  let [count, x, y] = [0, 0, 0];
  missing.forEach((value, i) => {
    count += value;
    x += value * (i % width);
    y += value * Math.floor(i / width);
  });
  return count ? { x: x / count / width, y: y / count / height } : { x: 0.5, y: 0.5 };
}

function missingPixels(mask) {
  const { naturalWidth: width, naturalHeight: height } = mask;
  const canvas = document.createElement("canvas");
  Object.assign(canvas, { width, height });
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.drawImage(mask, 0, 0);
  const { data } = context.getImageData(0, 0, width, height);
  return Uint8Array.from({ length: width * height }, (_, i) => (data[4 * i] > 127 ? 1 : 0));
}

/** Returns the path along all edges between a missing pixel and one that is known or outside. */
function boundary(missing, width, height) {
  const at = (x, y) => (x < 0 || y < 0 || x >= width || y >= height ? 0 : missing[y * width + x]);
  const parts = [];
  const trace = (lines, length, differs, draw) => {
    for (let line = 0; line <= lines; line++) {
      for (let i = 0; i < length; i++) {
        if (!differs(line, i)) continue;
        const first = i;
        while (i + 1 < length && differs(line, i + 1)) i++;
        parts.push(draw(line, first, i + 1 - first));
      }
    }
  };
  const rows = (y, x, run) => `M${x} ${y}h${run}`;
  const columns = (x, y, run) => `M${x} ${y}v${run}`;
  trace(height, width, (y, x) => at(x, y) !== at(x, y - 1), rows);
  trace(width, height, (x, y) => at(x, y) !== at(x - 1, y), columns);
  return parts.join("");
}
