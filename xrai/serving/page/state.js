// What survives a reload: filters and the open film in the address, settings in the browser.

const KEY = "xrai";
const FILTERS = ["text", "review", "decision", "source"];
const USUAL = {
  invert: false,
  heat: false,
  opacity: 50,
  output: "", // the selected class or finding
  tool: "window",
  keys: true, // whether single keys are shortcuts
  selected: "", // a film's id
  prevalence: {}, // by class or finding, as on the ward
  view: null, // window and zoom of the open film
};

export const settings = { ...USUAL, ...read() };

function read() {
  try {
    return JSON.parse(localStorage.getItem(KEY)) ?? {};
  } catch {
    return {}; // none, or no storage
  }
}

export function keep(changes) {
  Object.assign(settings, changes);
  try {
    localStorage.setItem(KEY, JSON.stringify(settings));
  } catch {
    // storage is full or forbidden: the page works without it
  }
}

// {text, review, decision, source, film} of the address, "" where it has none
export function readAddress() {
  const asked = new URLSearchParams(location.search);
  return Object.fromEntries([...FILTERS, "film"].map((name) => [name, asked.get(name) ?? ""]));
}

// With `isStep`, the browser's back button leads to where it was
export function writeAddress(wanted, isStep = false) {
  const asked = new URLSearchParams();
  for (const [name, value] of Object.entries(wanted)) if (value) asked.set(name, value);
  const text = asked.size ? `?${asked}` : location.pathname;
  if (`?${asked}` === location.search || (!asked.size && !location.search)) return;
  history[isStep ? "pushState" : "replaceState"](null, "", text);
}
