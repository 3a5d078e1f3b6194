"use strict";

// The key stays in the field: nothing is stored, and a reload forgets it.
const $ = (id) => document.getElementById(id);
const models = new Map();
let messages = [];
let running = null;

const headers = () => ($("key").value ? { authorization: `Bearer ${$("key").value.trim()}` } : {});

function say(text, isBad = false) {
  $("status").textContent = text;
  $("status").classList.toggle("bad", isBad);
}

async function failure(response) {
  try {
    return (await response.json()).error.message;
  } catch {
    return `the gateway answered ${response.status}`;
  }
}

async function connect(event) {
  event.preventDefault();
  say("Connecting…");
  const before = $("model").value;
  models.clear();
  try {
    const response = await fetch("/v1/models", { headers: headers() });
    if (!response.ok) throw new Error(await failure(response));
    for (const model of (await response.json()).data) models.set(model.id, model);
  } catch (error) {
    say(error.message, true);
  }
  $("model").replaceChildren(...[...models.keys()].map((name) => new Option(name, name)));
  $("model").disabled = models.size === 0;
  if (models.has(before)) $("model").value = before;
  if (models.size) say(`${models.size} ${models.size === 1 ? "model" : "models"} for this key.`);
  else if (!$("status").classList.contains("bad")) say("This key may use no model.", true);
  choose();
}

function choose() {
  const model = models.get($("model").value);
  const isText = Boolean(model && model.task === "causal_lm");
  const isPicture = Boolean(model && model.task.startsWith("image"));
  $("chat").hidden = $("tuning").hidden = !isText;
  $("pictures").hidden = !isPicture;
  $("elsewhere").hidden = !model || isText || isPicture;
  $("about").textContent = model
    ? [model.task, `engine ${model.engine}`, model.context_tokens && `${model.context_tokens} tokens of context`]
        .filter(Boolean)
        .join(" · ")
    : "";
}

function addTurn(role, text) {
  const item = document.createElement("li");
  item.className = role;
  const who = document.createElement("span");
  who.className = "who";
  who.textContent = role === "user" ? "You" : $("model").value;
  const body = document.createElement("span");
  body.textContent = text;
  item.append(who, body);
  $("turns").append(item);
  return body;
}

const page = document.documentElement;
const isAtEnd = () => page.scrollHeight - page.scrollTop - page.clientHeight < 40;
const goToEnd = () => page.scrollTo(0, page.scrollHeight);

async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    held += value;
    const parts = held.split("\n\n");
    held = parts.pop();
    for (const part of parts) {
      const data = part.replace(/^data: /, "");
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}

async function ask(event) {
  event.preventDefault();
  const prompt = $("prompt").value.trim();
  if (!prompt || running) return;
  const earlier = messages;
  messages = [...messages, { role: "user", content: prompt }];
  const question = addTurn("user", prompt);
  const body = addTurn("assistant", "");
  goToEnd();
  $("prompt").value = "";
  running = new AbortController();
  $("send").disabled = $("clear").disabled = true;
  $("stop").disabled = false;
  $("turns").setAttribute("aria-busy", "true");
  say("Answering…");
  const started = performance.now();
  let text = "";
  let usage = null;
  let outcome = "";
  try {
    const system = $("system").value.trim();
    const response = await fetch("/v1/chat/completions", {
      method: "POST",
      headers: { ...headers(), "content-type": "application/json" },
      signal: running.signal,
      body: JSON.stringify({
        model: $("model").value,
        messages: [...(system ? [{ role: "system", content: system }] : []), ...messages],
        temperature: Number($("temperature").value),
        max_tokens: Number($("length").value),
        stream: true,
        stream_options: { include_usage: true },
      }),
    });
    if (!response.ok) throw new Error(await failure(response));
    for await (const item of events(response)) {
      if (item.error) throw new Error(item.error.message);
      usage = item.usage || usage;
      text += item.choices[0]?.delta.content ?? "";
      const follows = isAtEnd(); // who reads further up is left there
      body.textContent = text;
      if (follows) goToEnd();
    }
    const seconds = (performance.now() - started) / 1000;
    outcome = usage ? `${usage.completion_tokens} tokens in ${seconds.toFixed(1)} s.` : "Done.";
    say(outcome);
  } catch (error) {
    if (error.name === "AbortError") say("Stopped.");
    else say(error.message, true);
  }
  if (text) messages.push({ role: "assistant", content: text });
  else {
    messages = earlier; // nothing came: the question goes back to where it can be sent again
    question.parentElement.remove();
    body.parentElement.remove();
    $("prompt").value ||= prompt;
  }
  running = null;
  $("send").disabled = $("clear").disabled = false;
  $("stop").disabled = true;
  $("turns").removeAttribute("aria-busy");
  $("prompt").focus();
}

async function classify(event) {
  event.preventDefault();
  const files = [...$("files").files];
  const form = new FormData();
  for (const file of files) form.append("inputs", file);
  say("Classifying…");
  $("answers").replaceChildren();
  try {
    const name = encodeURIComponent($("model").value);
    const response = await fetch(`/v1/predict/${name}`, { method: "POST", headers: headers(), body: form });
    if (!response.ok) throw new Error(await failure(response));
    for (const { index, output } of (await response.json()).data) {
      const item = document.createElement("li");
      const picture = document.createElement("img");
      picture.src = URL.createObjectURL(files[index]);
      picture.alt = files[index].name;
      picture.onload = () => URL.revokeObjectURL(picture.src);
      const text = document.createElement("div");
      text.textContent = Object.entries(output)
        .map(([key, value]) => `${key}: ${typeof value === "number" ? +value.toFixed(4) : JSON.stringify(value)}`)
        .join(", ");
      item.append(picture, text);
      $("answers").append(item);
    }
    say(`${files.length} answered.`);
  } catch (error) {
    say(error.message, true);
  }
}

$("settings").addEventListener("submit", connect);
$("model").addEventListener("change", choose);
$("ask").addEventListener("submit", ask);
$("classify").addEventListener("submit", classify);
$("stop").addEventListener("click", () => running && running.abort());
$("clear").addEventListener("click", () => {
  messages = [];
  $("turns").replaceChildren();
  say("");
});
$("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey) {
    event.preventDefault();
    $("ask").requestSubmit();
  }
});
