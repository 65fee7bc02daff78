// The mask: strokes on a canvas of the image's size, with undo. The page shows it over the image.

const COLOUR = "#ff4f2e";
const PIXELS = 128 * 128; // up to here a pixel is large on the screen: strokes have hard edges

export class Mask {
  constructor(canvas, stage, cursor, changed) {
    Object.assign(this, { canvas, stage, cursor, changed });
    this.context = canvas.getContext("2d", { willReadFrequently: true });
    this.tool = "brush";
    this.size = 14; // diameter, percent of the shorter side
    this.locked = false;
    this.strokes = [];
    canvas.addEventListener("pointerdown", (event) => this.down(event));
    canvas.addEventListener("pointermove", (event) => this.move(event));
    for (const name of ["pointerup", "pointercancel"]) {
      canvas.addEventListener(name, (event) => this.up(event));
    }
    canvas.addEventListener("pointerleave", () => (cursor.hidden = true));
  }

  // Starts an empty mask, or that of an image whose white pixels are missing.
  reset(width, height, image = null) {
    this.canvas.width = width;
    this.canvas.height = height;
    this.stroke = null;
    this.strokes = [];
    if (image) this.strokes.push({ tool: "image", layer: this.layer(image) });
    this.redraw();
  }

  layer(image) {
    const canvas = document.createElement("canvas");
    canvas.width = this.canvas.width;
    canvas.height = this.canvas.height;
    const context = canvas.getContext("2d");
    context.imageSmoothingEnabled = false;
    context.drawImage(image, 0, 0, canvas.width, canvas.height);
    const pixels = context.getImageData(0, 0, canvas.width, canvas.height);
    for (let i = 0; i < pixels.data.length; i += 4) {
      pixels.data[i + 3] = pixels.data[i] > 127 ? 255 : 0;
    }
    context.putImageData(pixels, 0, 0);
    context.globalCompositeOperation = "source-in";
    context.fillStyle = COLOUR;
    context.fillRect(0, 0, canvas.width, canvas.height);
    return canvas;
  }

  get radius() {
    return Math.max(0.5, (this.size / 200) * Math.min(this.canvas.width, this.canvas.height));
  }

  point(event) {
    const box = this.canvas.getBoundingClientRect();
    return [
      ((event.clientX - box.left) / box.width) * this.canvas.width,
      ((event.clientY - box.top) / box.height) * this.canvas.height,
    ];
  }

  down(event) {
    if (this.locked || event.button > 0 || this.stroke) return;
    event.preventDefault();
    this.canvas.setPointerCapture(event.pointerId);
    const point = this.point(event);
    this.stroke = { tool: this.tool, radius: this.radius, points: [point, point] };
    this.draw(this.stroke);
  }

  move(event) {
    this.follow(event);
    if (!this.stroke) return;
    const points = this.stroke.points;
    if (this.stroke.tool === "box") {
      points[1] = this.point(event);
      this.redraw(false);
      this.draw(this.stroke);
      return;
    }
    for (const each of event.getCoalescedEvents?.() ?? [event]) {
      points.push(this.point(each));
      this.segment(this.stroke, points.at(-2), points.at(-1));
    }
  }

  up() {
    if (!this.stroke) return;
    this.strokes.push(this.stroke);
    this.stroke = null;
    this.changed();
  }

  // Shows the size of the brush at the pointer.
  follow(event) {
    const box = this.canvas.getBoundingClientRect();
    const side = (2 * this.radius * box.width) / this.canvas.width;
    this.cursor.hidden = this.locked || this.tool === "box" || event.pointerType === "touch";
    this.cursor.style.width = this.cursor.style.height = `${side}px`;
    this.cursor.style.left = `${event.clientX - box.left}px`;
    this.cursor.style.top = `${event.clientY - box.top}px`;
  }

  undo() {
    if (this.locked || !this.strokes.length) return;
    this.strokes.pop();
    this.redraw();
  }

  clear() {
    if (this.locked || this.isEmpty()) return;
    this.strokes.push({ tool: "clear" });
    this.redraw();
  }

  redraw(tells = true) {
    this.context.clearRect(0, 0, this.canvas.width, this.canvas.height);
    this.strokes.forEach((stroke) => this.draw(stroke));
    if (tells) this.changed();
  }

  draw(stroke) {
    const { context, canvas } = this;
    context.globalCompositeOperation = "source-over";
    context.fillStyle = COLOUR;
    if (stroke.tool === "clear") {
      context.clearRect(0, 0, canvas.width, canvas.height);
    } else if (stroke.tool === "image") {
      context.drawImage(stroke.layer, 0, 0);
    } else if (stroke.tool === "box") {
      const [[x, y], [u, v]] = stroke.points;
      const [left, top] = [Math.floor(Math.min(x, u)), Math.floor(Math.min(y, v))];
      const [right, bottom] = [Math.ceil(Math.max(x, u)), Math.ceil(Math.max(y, v))];
      context.fillRect(left, top, right - left, bottom - top);
    } else {
      for (let i = 1; i < stroke.points.length; i++) {
        this.segment(stroke, stroke.points[i - 1], stroke.points[i]);
      }
    }
  }

  segment({ tool, radius }, [x, y], [u, v]) {
    const { context, canvas } = this;
    context.globalCompositeOperation = tool === "eraser" ? "destination-out" : "source-over";
    context.fillStyle = context.strokeStyle = COLOUR;
    if (canvas.width * canvas.height > PIXELS) {
      context.lineWidth = 2 * radius;
      context.lineCap = "round";
      context.beginPath();
      context.moveTo(x, y);
      context.lineTo(u, v + 1e-3); // a line of no length is not drawn
      context.stroke();
      return;
    }
    const reach = Math.max(radius, 0.71); // the pixel under the pointer at least
    const length = (u - x) ** 2 + (v - y) ** 2;
    for (let row = 0; row < canvas.height; row++) {
      for (let column = 0; column < canvas.width; column++) {
        const [a, b] = [column + 0.5 - x, row + 0.5 - y];
        const t = length ? Math.min(1, Math.max(0, (a * (u - x) + b * (v - y)) / length)) : 0;
        const distance = Math.hypot(a - t * (u - x), b - t * (v - y));
        if (distance <= reach) context.fillRect(column, row, 1, 1);
      }
    }
  }

  isEmpty() {
    const { data } = this.context.getImageData(0, 0, this.canvas.width, this.canvas.height);
    for (let i = 3; i < data.length; i += 4) if (data[i] > 127) return false;
    return true;
  }

  // Returns the mask as a PNG of the given size in base64, white where the image is missing.
  async encode(width, height) {
    const canvas = document.createElement("canvas");
    canvas.width = width;
    canvas.height = height;
    const context = canvas.getContext("2d");
    context.imageSmoothingEnabled = false;
    context.drawImage(this.canvas, 0, 0, width, height);
    context.globalCompositeOperation = "source-in";
    context.fillStyle = "#fff";
    context.fillRect(0, 0, width, height);
    context.globalCompositeOperation = "destination-over";
    context.fillStyle = "#000";
    context.fillRect(0, 0, width, height);
    const blob = await new Promise((resolve) => canvas.toBlob(resolve, "image/png"));
    const reader = new FileReader();
    const read = new Promise((resolve) => (reader.onload = resolve));
    reader.readAsDataURL(blob);
    await read;
    return reader.result.split(",")[1];
  }
}
