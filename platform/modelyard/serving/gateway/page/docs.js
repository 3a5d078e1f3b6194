"use strict";

// Renders /openapi.json with nothing from outside, so that it works where there is no internet.
function made(tag, text = "", ...children) {
  const element = document.createElement(tag);
  element.textContent = text;
  element.append(...children);
  return element;
}

function kindOf(schema) {
  if (schema.$ref) return schema.$ref.split("/").pop();
  if (schema.const !== undefined) return JSON.stringify(schema.const);
  if (schema.enum) return schema.enum.map((value) => JSON.stringify(value)).join(" | ");
  const members = schema.anyOf || schema.oneOf;
  if (members) return members.map(kindOf).join(" | ");
  if (schema.type === "array") return `list of ${kindOf(schema.items || {})}`;
  return schema.type || "any";
}

function fields(schema) {
  const rows = Object.entries(schema.properties || {}).map(([name, field]) => {
    const needed = (schema.required || []).includes(name) ? "required" : "";
    return made("tr", "", made("td", name), made("td", kindOf(field)), made("td", needed));
  });
  const head = made("tr", "", ...["field", "type", ""].map((text) => {
    const cell = made("th", text);
    cell.scope = "col";
    return cell;
  }));
  return made("table", "", made("thead", "", head), made("tbody", "", ...rows));
}

function call(path, method, operation, schemas) {
  const title = made("h2", "", made("code", `${method.toUpperCase()} ${path}`), ` ${operation.summary || ""}`);
  const card = made("section", "", title);
  card.className = "call";
  for (const [kind, { schema }] of Object.entries(operation.requestBody?.content || {})) {
    const name = schema.$ref ? schema.$ref.split("/").pop() : "";
    const summary = made("summary", `${kind} ${name}`);
    card.append(made("details", "", summary, fields(name ? schemas[name] : schema)));
  }
  return card;
}

async function show() {
  const document_ = await (await fetch("/openapi.json")).json();
  const calls = Object.entries(document_.paths).flatMap(([path, methods]) =>
    Object.entries(methods).map(([method, operation]) => call(path, method, operation, document_.components.schemas)),
  );
  const parts = document_.info.description.split("`"); // every second one stands in backticks
  document.getElementById("intro").replaceChildren(...parts.map((text, at) => (at % 2 ? made("code", text) : text)));
  document.getElementById("calls").append(...calls);
}

show().catch((error) => {
  document.getElementById("intro").textContent = `openapi.json cannot be read: ${error.message}`;
});
