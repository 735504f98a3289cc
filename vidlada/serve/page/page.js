// The page: choose a video, ask, watch the answer denoise. No build step, nothing from elsewhere.

const element = (id) => document.getElementById(id);
const NAMES = ["A", "B"];
let upload = null; // {id, frames} of the chosen video
let running = null; // AbortController of the answer being made

// --- the server ---

function headers(extra = {}) {
  const key = element("key").value.trim();
  return key ? { Authorization: `Bearer ${key}`, ...extra } : extra;
}

async function failure(response) {
  if (response.status === 401) element("key-box").open = true;
  const body = await response.json().catch(() => null);
  return new Error(body?.error?.message ?? `the server answered ${response.status}`);
}

async function get(path) {
  const response = await fetch(path, { headers: headers() });
  if (!response.ok) throw await failure(response);
  return response.json();
}

// XMLHttpRequest, because fetch does not tell how much has been sent.
function send(file, onProgress) {
  return new Promise((resolve, reject) => {
    const request = new XMLHttpRequest();
    request.open("POST", "v1/files");
    for (const [name, value] of Object.entries(headers())) request.setRequestHeader(name, value);
    request.upload.onprogress = (event) => onProgress(event.loaded / event.total);
    request.onerror = () => reject(new Error("the upload failed; the file may be too large, or the server is gone"));
    request.onload = () => {
      const body = JSON.parse(request.responseText || "{}");
      if (request.status === 401) element("key-box").open = true;
      if (request.status === 200) resolve(body);
      else reject(new Error(body?.error?.message ?? `the server answered ${request.status}`));
    };
    const form = new FormData();
    form.append("purpose", "user_data");
    form.append("file", file);
    request.send(form);
  });
}

async function* events(body, signal) {
  const response = await fetch("v1/chat/completions", {
    method: "POST",
    headers: headers({ "Content-Type": "application/json" }),
    body: JSON.stringify(body),
    signal,
  });
  if (!response.ok) throw await failure(response);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let pending = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) throw new Error("the server broke the answer off");
    const parts = (pending + value).split("\n\n");
    pending = parts.pop();
    for (const part of parts) {
      const content = part.replace(/^data: /, "");
      if (content === "[DONE]") return;
      const event = JSON.parse(content);
      if (event.error) throw new Error(event.error.message);
      yield event;
    }
  }
}

// --- the video ---

function report(error) {
  const box = element("error");
  box.hidden = !error;
  box.textContent = error ? `Sorry: ${error.message}` : "";
  if (error) box.scrollIntoView({ block: "nearest" });
}

async function watch(file) {
  report(null);
  upload = null;
  const progress = element("progress");
  const [preview, strip, facts] = [element("preview"), element("strip"), element("facts")];
  strip.hidden = true;
  if (preview.src) URL.revokeObjectURL(preview.src);
  preview.src = URL.createObjectURL(file);
  preview.hidden = !file.type.startsWith("video/");
  progress.hidden = false;
  element("ask").disabled = true; // a question must not slip past the video it is about
  facts.textContent = `Sending ${file.name} …`;
  try {
    const sent = await send(file, (share) => { progress.value = share; });
    facts.textContent = "Sampling frames …";
    await sample(sent.id);
    upload = sent;
  } catch (error) {
    facts.textContent = "No video: a question is asked without one.";
    preview.hidden = true;
    element("file").value = "";
    report(error);
  } finally {
    progress.hidden = true;
    element("ask").disabled = false;
  }
}

async function sample(id) {
  const frames = element("panels").querySelector("[name=frames]").value || 64;
  const seen = await get(`v1/files/${id}/frames?frames=${frames}`);
  const duration = seen.duration ? `, ${seen.duration.toFixed(1)} s` : "";
  element("facts").textContent = `${seen.width} × ${seen.height}${duration}; the model sees ${seen.frames.length} frames:`;
  const strip = element("strip");
  strip.replaceChildren(...seen.frames.map(({ time, image }) => {
    const item = document.createElement("li");
    const picture = document.createElement("img");
    picture.src = image;
    picture.alt = `frame at ${time.toFixed(1)} seconds`;
    item.append(picture, `${time.toFixed(1)} s`);
    return item;
  }));
  strip.hidden = false;
}

async function offerSamples() {
  const box = element("samples");
  const samples = await get("samples/index.json").catch(() => []);
  box.hidden = samples.length === 0;
  for (const { file, name, question } of samples) {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = name;
    button.onclick = async () => {
      const content = await (await fetch(`samples/${file}`)).blob();
      element("question").value = question;
      element("file").value = "";
      await watch(new File([content], file, { type: "video/mp4" }));
    };
    box.append(" ", button);
  }
}

// --- the answer ---

const number = (fields, name) => (fields[name].value === "" ? undefined : Number(fields[name].value));

function settingsOf(fieldset) {
  const fields = Object.fromEntries([...fieldset.querySelectorAll("[name]")].map((field) => [field.name, field]));
  const settings = { cache: fields.cache.value.trim() || undefined };
  for (const name of ["gen_length", "block_length", "temperature", "seed", "frames"]) settings[name] = number(fields, name);
  if (fields.pace.value) settings[fields.pace.value] = number(fields, "pace_value");
  return settings;
}

function show(article, draft) {
  const spans = draft.tokens.map(({ text, final, confidence }) => {
    const span = document.createElement("span");
    span.textContent = text ?? " ·";
    const sure = Math.min(4, Math.floor(confidence * 5));
    span.className = `token ${text === null ? "open" : final ? "final" : `sure-${sure}`}`;
    span.title = text === null ? "open" : `${final ? "settled" : "provisional"}, ${Math.round(confidence * 100)} %`;
    return span;
  });
  article.querySelector(".draft").replaceChildren(...spans);
}

function statistics(article, draft, seconds) {
  const { steps, tokens, forward_passes: passes, seconds: phases } = draft.statistics;
  const rows = [
    ["steps", steps],
    ["tokens decided", tokens],
    ["tokens a forward pass", (tokens / passes).toFixed(2)],
    ["tokens a second, denoising", (tokens / phases.denoising).toFixed(1)],
    ...Object.entries(phases).map(([phase, value]) => [`${phase}, s`, value.toFixed(3)]),
    ["seen from here, s", seconds.toFixed(3)],
  ];
  const table = article.querySelector("table");
  table.tBodies[0].replaceChildren(...rows.map(([name, value]) => {
    const row = document.createElement("tr");
    const head = document.createElement("th");
    head.scope = "row";
    head.textContent = name;
    row.append(head);
    row.insertCell().textContent = value;
    return row;
  }));
  table.hidden = false;
}

async function answer(article, question, settings, signal) {
  const said = article.querySelector(".said");
  said.textContent = "waiting …";
  const content = [{ type: "text", text: question }];
  if (upload) content.push({ type: "file", file: { file_id: upload.id } });
  const body = { model: element("model").textContent, stream: true, diffusing: true, ...settings,
                 messages: [{ role: "user", content }] };
  const started = performance.now();
  let text = "", latest = null, drawn = true;
  const draw = () => {
    if (!drawn) show(article, latest);
    drawn = true;
  };
  for await (const event of events(body, signal)) {
    text += event.choices[0]?.delta.content ?? "";
    if (event.diffusion) {
      latest = event.diffusion;
      said.textContent = `step ${latest.step} …`;
      if (drawn) requestAnimationFrame(draw);
      drawn = false;
    }
  }
  drawn = false;
  draw();
  said.textContent = text || "(the model said nothing)";
  statistics(article, latest, (performance.now() - started) / 1000);
}

async function ask(event) {
  event.preventDefault();
  report(null);
  const chosen = [...element("panels").children].map(settingsOf);
  running = new AbortController();
  busy(true);
  const articles = prepareAnswers(chosen.length);
  try {
    // one after the other: answers made together share their steps, and their times would say nothing
    for (const [place, settings] of chosen.entries()) {
      await answer(articles[place], element("question").value, settings, running.signal);
    }
  } catch (error) {
    for (const said of document.querySelectorAll(".said")) {
      if (/^(waiting|step)/.test(said.textContent)) said.textContent = error.name === "AbortError" ? "stopped" : "failed";
    }
    if (error.name !== "AbortError") report(error);
  } finally {
    busy(false);
  }
}

function busy(is) {
  element("ask").disabled = is;
  element("stop").disabled = !is;
}

// --- panels ---

function stamp(templateId, place, total) {
  const copy = element(templateId).content.firstElementChild.cloneNode(true);
  const title = copy.querySelector("legend, h3");
  title.textContent = total > 1 ? `Setting ${NAMES[place]}` : "";
  title.hidden = total === 1;
  return copy;
}

function prepareAnswers(total) {
  const articles = Array.from({ length: total }, (_, place) => stamp("answer-template", place, total));
  element("answers").replaceChildren(...articles);
  return articles;
}

function preparePanels(total, defaults) {
  const panels = element("panels");
  while (panels.children.length > total) panels.lastElementChild.remove();
  while (panels.children.length < total) {
    const panel = stamp("settings-template", panels.children.length, 2);
    const [pace, value] = [panel.querySelector("[name=pace]"), panel.querySelector("[name=pace_value]")];
    pace.onchange = () => {
      value.disabled = !pace.value;
      value.required = Boolean(pace.value);
      value.value = { threshold: 0.9, factor: 1, steps: 32 }[pace.value] ?? "";
    };
    if (defaults.max_frames < 64) panel.querySelector("[name=frames]").value = defaults.max_frames;
    for (const name of ["gen_length", "block_length"]) panel.querySelector(`[name=${name}]`).value = defaults[name] ?? "";
    if (panels.children.length === 1) panel.querySelector("[name=cache]").value = "mars";
    panels.append(panel);
  }
}

async function start() {
  let defaults = {};
  try {
    const [model] = (await get("v1/models")).data;
    element("model").textContent = model.id;
    defaults = model.vidlada;
    element("watching").hidden = defaults.text_only;
    element("key-box").open = false;
    report(null);
  } catch (error) {
    report(error);
  }
  element("panels").replaceChildren();
  preparePanels(element("compare").checked ? 2 : 1, defaults);
  element("compare").onchange = () => {
    preparePanels(element("compare").checked ? 2 : 1, defaults);
    element("settings").open ||= element("compare").checked;
  };
}

prepareAnswers(1);
start();
offerSamples();
element("key").onchange = start;
element("form").onsubmit = ask;
element("stop").onclick = () => running?.abort();
element("file").onchange = () => element("file").files[0] && watch(element("file").files[0]);
const drop = element("drop");
drop.ondragover = (event) => { event.preventDefault(); drop.classList.add("over"); };
drop.ondragleave = () => drop.classList.remove("over");
drop.ondrop = (event) => {
  event.preventDefault();
  drop.classList.remove("over");
  if (event.dataTransfer.files[0]) watch(event.dataTransfer.files[0]);
};
