// The model's card: what it looks for, how well, measured on what, and where it fails.

import { find, make } from "./dom.js";
import { measuredWords, nameWords, percent, rangeWords, say } from "./words.js";

const RATES = ["sensitivity", "specificity", "auroc"];

// `model` is `fetchModel` of api.js
export function showCard(model) {
  find("card-body").replaceChildren(facts(model), rates(model), ...limits());
  find("card").showModal();
}

function facts(model) {
  const rows = [
    [say("card_looks_for"), model.outputs.map((output) => nameWords(output.name)).join(", ")],
    [say("scored_by"), model.run],
    [say("card_trained"), model.trainedOn],
    [say("card_measured"), measuredWords(model)],
  ];
  const list = make("dl", "facts");
  for (const [what, text] of rows) {
    if (text) list.append(make("dt", "", what), make("dd", "", text));
  }
  return list;
}

function rates(model) {
  const head = make("tr", "", make("th", "", say("result")));
  head.append(...[...RATES, "threshold"].map((key) => make("th", "", say(key))));
  const table = make("table", "", make("thead", "", head));
  table.append(make("tbody", "", ...model.outputs.map(row)));
  const box = make("div", "scroll", table);
  box.tabIndex = 0;
  return box;
}

function row(output) {
  const name = make("th", "", nameWords(output.name));
  name.scope = "row";
  const cells = RATES.map((key) => {
    const cell = make("td", "", key === "auroc" ? decimal(output[key]) : percent(output[key]));
    const range = key === "auroc" ? "" : rangeWords(output.intervals?.[key]);
    if (range) cell.append(make("span", "interval", range.trim()));
    return cell;
  });
  return make("tr", "", name, ...cells, make("td", "", percent(output.threshold)));
}

function decimal(value) {
  if (value === null) return "–";
  return value.toLocaleString(document.documentElement.lang, { maximumFractionDigits: 3 });
}

function limits() {
  const names = ["card_limit_known", "card_limit_hospital", "card_limit_review"];
  const list = make("ul", "", ...names.map((name) => make("li", "", say(name))));
  return [make("h3", "", say("card_limits")), list];
}
