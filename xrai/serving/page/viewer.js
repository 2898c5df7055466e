// One film on a canvas at its own resolution: window and level, invert, zoom, pan, heat map.
// Drag sets the window (across: width, up and down: centre), the wheel or two fingers zoom, the
// right or the middle button pans, as in other viewers of radiology.

import { greyTable } from "./window.js";

const WHEEL_SPEED = 0.0015;
const MAX_SCALE = 32; // screen pixels per pixel of the film
const SMALLEST_WINDOW = 1;

export class Viewer {
  // `onChange` is called after each change of window or zoom
  constructor(canvas, onChange) {
    this.canvas = canvas;
    this.onChange = onChange;
    this.tool = "window"; // or "pan"
    this.isInverted = false;
    this.film = null;
    this.heat = null;
    this.opacity = 0.5;
    this.view = { scale: 1, x: 0, y: 0, isFitted: true }; // in CSS pixels of the canvas
    this.window = { centre: 0, width: 1 };
    this.pointers = new Map();
    this.drawn = document.createElement("canvas"); // the film at its own size, in shown greys
    this.isStale = false; // whether `drawn` is older than the window
    this.frame = 0;
    this.listen();
    new ResizeObserver(() => this.resize()).observe(canvas);
  }

  // A film of `readPng` with {slope, intercept, centre, width, isInverse}: how its values become
  // those that the window is given in, its own window, and whether its low values are white
  open(image, own, kept) {
    this.film = { ...image, own };
    this.heat = null;
    this.window = kept ? kept.window : { centre: own.centre, width: own.width };
    this.drawn.width = image.width;
    this.drawn.height = image.height;
    this.view = kept ? kept.view : { ...this.view, isFitted: true };
    this.resize();
    this.repaint();
  }

  close() {
    this.film = null;
    this.heat = null;
    this.pointers.clear();
    this.redraw();
  }

  // What a reload brings back
  get kept() {
    return { window: this.window, view: this.view };
  }

  setWindow(centre, width) {
    this.window = { centre, width: Math.max(SMALLEST_WINDOW, width) };
    this.repaint();
  }

  resetWindow() {
    const { centre, width } = this.film.own;
    this.setWindow(centre, width);
  }

  setInverted(isInverted) {
    this.isInverted = isInverted;
    this.repaint();
  }

  // An image that lies over the whole film, or null
  setHeat(image) {
    this.heat = image;
    this.redraw();
  }

  setOpacity(opacity) {
    this.opacity = opacity;
    this.redraw();
  }

  fit() {
    this.view.isFitted = true;
    this.resize();
  }

  // One pixel of the film per pixel of the screen
  actualSize() {
    const { clientWidth, clientHeight } = this.canvas;
    this.zoomTo(1 / devicePixelRatio, clientWidth / 2, clientHeight / 2);
  }

  zoomBy(factor) {
    const { clientWidth, clientHeight } = this.canvas;
    this.zoomTo(this.view.scale * factor, clientWidth / 2, clientHeight / 2);
  }

  panBy(x, y) {
    this.view = { ...this.view, x: this.view.x + x, y: this.view.y + y, isFitted: false };
    this.keepInSight();
    this.redraw();
  }

  // Zooms to a scale about the point (x, y) of the canvas
  zoomTo(wanted, x, y) {
    if (!this.film) return;
    const scale = Math.min(MAX_SCALE, Math.max(this.fittedScale / 2, wanted));
    const ratio = scale / this.view.scale;
    this.view = {
      scale,
      x: x - (x - this.view.x) * ratio,
      y: y - (y - this.view.y) * ratio,
      isFitted: false,
    };
    this.keepInSight();
    this.redraw();
  }

  get fittedScale() {
    const { clientWidth, clientHeight } = this.canvas;
    return Math.min(clientWidth / this.film.width, clientHeight / this.film.height) || 1;
  }

  // A corner of the film always stays on the canvas
  keepInSight() {
    if (!this.film) return;
    const { clientWidth, clientHeight } = this.canvas;
    const { scale } = this.view;
    const within = (at, length, room) => {
      const least = Math.min(64, room / 2);
      return Math.min(room - least, Math.max(least - length, at));
    };
    this.view.x = within(this.view.x, this.film.width * scale, clientWidth);
    this.view.y = within(this.view.y, this.film.height * scale, clientHeight);
  }

  resize() {
    const { canvas, view } = this;
    const width = Math.round(canvas.clientWidth * devicePixelRatio);
    const height = Math.round(canvas.clientHeight * devicePixelRatio);
    if (canvas.width !== width) canvas.width = width;
    if (canvas.height !== height) canvas.height = height;
    if (this.film && view.isFitted) {
      view.scale = this.fittedScale;
      view.x = (canvas.clientWidth - this.film.width * view.scale) / 2;
      view.y = (canvas.clientHeight - this.film.height * view.scale) / 2;
    }
    this.keepInSight();
    this.redraw();
  }

  repaint() {
    this.isStale = true;
    this.redraw();
  }

  redraw() {
    if (this.frame) return;
    this.frame = requestAnimationFrame(() => {
      this.frame = 0;
      if (this.film && this.isStale) this.paint();
      this.isStale = false;
      this.draw();
      this.onChange();
    });
  }

  paint() {
    const { width, height, pixels, bits, own } = this.film;
    const table = greyTable(bits, own, this.window, this.isInverted);
    const context = this.drawn.getContext("2d", { willReadFrequently: true });
    const image = context.createImageData(width, height);
    const out = new Uint32Array(image.data.buffer);
    for (let i = 0; i < out.length; i += 1) out[i] = table[pixels[i]];
    context.putImageData(image, 0, 0);
  }

  draw() {
    const { canvas, view } = this;
    const context = canvas.getContext("2d");
    context.setTransform(1, 0, 0, 1, 0, 0);
    context.clearRect(0, 0, canvas.width, canvas.height);
    if (!this.film) return;
    const ratio = devicePixelRatio;
    const scale = view.scale * ratio;
    context.setTransform(scale, 0, 0, scale, view.x * ratio, view.y * ratio);
    context.imageSmoothingQuality = "high";
    context.drawImage(this.drawn, 0, 0);
    if (!this.heat) return;
    context.globalAlpha = this.opacity;
    context.drawImage(this.heat, 0, 0, this.film.width, this.film.height);
    context.globalAlpha = 1;
  }

  // ------------------------------------------------------------------------- mouse, pen, fingers

  listen() {
    const { canvas } = this;
    canvas.addEventListener("contextmenu", (event) => event.preventDefault());
    canvas.addEventListener("wheel", (event) => this.wheel(event), { passive: false });
    canvas.addEventListener("dblclick", () => this.film && this.fit());
    canvas.addEventListener("pointerdown", (event) => this.press(event));
    canvas.addEventListener("pointermove", (event) => this.move(event));
    for (const name of ["pointerup", "pointercancel"]) {
      canvas.addEventListener(name, (event) => this.pointers.delete(event.pointerId));
    }
  }

  wheel(event) {
    event.preventDefault();
    const lines = event.deltaMode === WheelEvent.DOM_DELTA_LINE ? 16 : 1;
    const factor = Math.exp(-event.deltaY * lines * WHEEL_SPEED);
    this.zoomTo(this.view.scale * factor, event.offsetX, event.offsetY);
  }

  press(event) {
    if (!this.film) return;
    if (event.button === 1) event.preventDefault(); // no scrolling by the middle button
    this.canvas.setPointerCapture(event.pointerId);
    const isPan = event.button > 0 || event.shiftKey || this.tool === "pan";
    this.pointers.set(event.pointerId, { x: event.offsetX, y: event.offsetY, isPan });
  }

  move(event) {
    const last = this.pointers.get(event.pointerId);
    if (!last || !this.film) return;
    const now = { ...last, x: event.offsetX, y: event.offsetY };
    if (this.pointers.size === 2) this.pinch(event.pointerId, last, now);
    else if (last.isPan) this.panBy(now.x - last.x, now.y - last.y);
    else this.dragWindow(now.x - last.x, now.y - last.y);
    this.pointers.set(event.pointerId, now);
  }

  pinch(id, last, now) {
    const [other] = [...this.pointers].filter(([each]) => each !== id).map(([, at]) => at);
    const apart = (at) => Math.hypot(at.x - other.x, at.y - other.y) || 1;
    const middle = (at) => ({ x: (at.x + other.x) / 2, y: (at.y + other.y) / 2 });
    const [from, to] = [middle(last), middle(now)];
    this.panBy(to.x - from.x, to.y - from.y);
    this.zoomTo((this.view.scale * apart(now)) / apart(last), to.x, to.y);
  }

  // A drag over the canvas's width widens the window by the range of the film's own window
  dragWindow(x, y) {
    const { low, high } = this.film.own;
    const step = (high - low) / Math.max(300, this.canvas.clientWidth);
    this.setWindow(this.window.centre + y * step, this.window.width + x * step);
  }
}
