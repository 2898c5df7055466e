// Elements, and what is said to people who cannot see them.

export const find = (id) => document.getElementById(id);

// An element with a class and contents; text stays text
export function make(tag, name = "", ...contents) {
  const element = document.createElement(tag);
  if (name) element.className = name;
  element.append(...contents);
  return element;
}

export function announce(text) {
  find("live").textContent = text;
}

// A bar from 0 to 100 % with the threshold on it; colours as in the report
export function meter(probability, threshold, isPositive) {
  const bar = make("span", isPositive ? "meter positive" : "meter");
  const fill = make("span", "fill");
  fill.style.width = `${100 * probability}%`;
  bar.append(fill);
  if (threshold !== undefined && threshold !== null) {
    const limit = make("span", "limit");
    limit.style.left = `${100 * threshold}%`;
    bar.append(limit);
  }
  bar.ariaHidden = "true";
  return bar;
}

export function callMark(words, film) {
  const kind = film.isReview ? "call review" : film.isPositive ? "call positive" : "call";
  return make("span", kind, make("span", "words", words));
}
