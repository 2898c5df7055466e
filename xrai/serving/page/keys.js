// Single keys as shortcuts, except where somebody writes, and unless the help turned them off.

import { find } from "./dom.js";
import { settings } from "./state.js";

const PAN = { ArrowLeft: [40, 0], ArrowRight: [-40, 0], ArrowUp: [0, 40], ArrowDown: [0, -40] };

// `ward` is main.js's
export function listenToKeys(ward) {
  addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (document.querySelector("dialog[open]")) return; // Esc closes it by itself
    const act = isWriting(event.target) ? writingKey(event) : keyOf(ward, event);
    if (!act) return;
    event.preventDefault();
    act();
  });
}

const isWriting = ({ tagName, type }) =>
  ["SELECT", "TEXTAREA"].includes(tagName) ||
  (tagName === "INPUT" && ["search", "text", "password", "number"].includes(type));

function writingKey(event) {
  if (event.key !== "Escape" || event.target.type !== "search" || event.target.value) return null;
  return () => find("rows").focus();
}

function keyOf(ward, event) {
  const { key, target } = event;
  const isOnList = target === find("rows") || target === document.body;
  if (key === "Escape" && ward.open) return () => ward.closeFilm();
  const { film } = ward.list;
  if (key === "Enter" && isOnList && film) return () => ward.openFilm(film, true);
  if (target === find("rows") && key in LIST_KEYS) return () => ward.list.move(LIST_KEYS[key]);
  if (target === find("canvas") && key in PAN) return () => ward.viewer.panBy(...PAN[key]);
  return settings.keys ? SHORTCUTS[key]?.(ward) : null;
}

const LIST_KEYS = { ArrowDown: 1, ArrowUp: -1, PageDown: 8, PageUp: -8, Home: -1e9, End: 1e9 };

const SHORTCUTS = {
  j: (ward) => () => ward.list.move(1),
  k: (ward) => () => ward.list.move(-1),
  "?": (ward) => () => ward.showHelp(),
  "/": () => () => find("filter-text").focus(),
  h: (ward) => ward.open && (() => ward.toggleHeat()),
  o: (ward) => ward.open && (() => ward.nextOutput()),
  i: (ward) => ward.open && (() => find("invert").click()),
  w: (ward) => ward.open && (() => ward.setTool("window")),
  p: (ward) => ward.open && (() => ward.setTool("pan")),
  r: (ward) => ward.open && (() => ward.resetView()),
  "+": (ward) => ward.open && (() => ward.viewer.zoomBy(1.25)),
  "=": (ward) => ward.open && (() => ward.viewer.zoomBy(1.25)),
  "-": (ward) => ward.open && (() => ward.viewer.zoomBy(0.8)),
  0: (ward) => ward.open && (() => find("fit").click()),
  1: (ward) => ward.open && (() => ward.viewer.actualSize()),
};
