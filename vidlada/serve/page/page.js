// The page: choose a video, ask, watch the answer denoise. No build step, nothing from elsewhere.

const element = (id) => document.getElementById(id);
const NAMES = ["A", "B"];
let upload = null; // the chosen video, as the server describes it
let sending = null; // AbortController of the upload under way
let running = null; // AbortController of the answer being made

function refreshButtons() {
  // a question must overtake neither its video nor the question before it
  element("ask").disabled = Boolean(sending || running);
  element("stop").disabled = !running;
}

// --- the server ---

function headers(extra = {}) {
  const key = element("key").value.trim();
  return key ? { Authorization: `Bearer ${key}`, ...extra } : extra;
}

function refusal(status, body) {
  if (status === 401) element("key-box").open = true;
  return new Error(body?.error?.message ?? `the server answered ${status}`);
}

async function failure(response) {
  return refusal(response.status, await response.json().catch(() => null));
}

async function get(path, signal) {
  const response = await fetch(path, { headers: headers(), signal });
  if (!response.ok) throw await failure(response);
  return response.json();
}

// A video that no question will be asked about; where this fails, the server lets it expire.
function forget(file) {
  if (file) fetch(`v1/files/${file.id}`, { method: "DELETE", headers: headers() }).catch(() => {});
}

// XMLHttpRequest, because fetch does not tell how much has been sent.
function send(file, onProgress, signal) {
  return new Promise((resolve, reject) => {
    const request = new XMLHttpRequest();
    request.open("POST", "v1/files");
    request.responseType = "json"; // null where it is not JSON
    signal.addEventListener("abort", () => { request.abort(); reject(signal.reason); });
    for (const [name, value] of Object.entries(headers())) request.setRequestHeader(name, value);
    request.upload.onprogress = (event) => onProgress(event.loaded / event.total);
    request.onerror = () => reject(new Error("the upload failed; the file may be too large, or the server is gone"));
    request.onload = () => {
      if (request.status === 200 && request.response) resolve(request.response);
      else reject(refusal(request.status, request.response));
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

// The video chosen last counts: one that is still on its way is given up.
async function watch(name, load) {
  report(null);
  sending?.abort();
  const mine = sending = new AbortController();
  refreshButtons();
  if (!running) forget(upload); // the second of two answers may still have to read it
  upload = null;
  let sent = null;
  const [preview, facts, progress] = [element("preview"), element("facts"), element("progress")];
  element("strip").hidden = preview.hidden = true;
  progress.value = 0;
  progress.hidden = false;
  facts.textContent = `Sending ${name} …`;
  try {
    const file = await load();
    mine.signal.throwIfAborted();
    if (preview.src) URL.revokeObjectURL(preview.src);
    preview.src = URL.createObjectURL(file);
    preview.hidden = !file.type.startsWith("video/");
    sent = await send(file, (share) => { progress.value = share; }, mine.signal);
    facts.textContent = "Sampling frames …";
    await sample(sent.id, mine.signal);
    upload = sent;
  } catch (error) {
    forget(sent);
    if (mine.signal.aborted) return;
    facts.textContent = "No video: a question is asked without one.";
    preview.hidden = true;
    element("file").value = "";
    report(error);
  } finally {
    if (sending === mine) {
      sending = null;
      progress.hidden = true;
      refreshButtons();
    }
  }
}

async function sample(id, signal) {
  const frames = element("panels").querySelector("[name=frames]").value || 64;
  const seen = await get(`v1/files/${id}/frames?frames=${frames}`, signal);
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
    button.onclick = () => {
      element("question").value = question;
      element("file").value = "";
      watch(file, async () => {
        const response = await fetch(`samples/${file}`);
        if (!response.ok) throw await failure(response);
        return new File([await response.blob()], file, { type: "video/mp4" });
      });
    };
    box.append(" ", button);
  }
}

// --- the answer ---

const number = (fields, name) => (fields[name].value === "" ? undefined : Number(fields[name].value));

function settingsOf(fieldset) {
  const fields = Object.fromEntries([...fieldset.querySelectorAll("[name]")].map((field) => [field.name, field]));
  const settings = { cache: fields.cache.value.trim() || undefined, remasking: fields.remasking.value };
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

async function answer(article, content, settings, signal) {
  const said = article.querySelector(".said");
  said.textContent = "waiting …";
  const body = { model: element("model").textContent, stream: true, diffusing: true, ...settings,
                 messages: [{ role: "user", content }] };
  const started = performance.now();
  let text = "", latest = null, drawn = true;
  const draw = () => {
    drawn = true;
    show(article, latest);
  };
  for await (const event of events(body, signal)) {
    signal.throwIfAborted(); // of several events that came together, too
    text += event.choices[0]?.delta.content ?? "";
    if (event.diffusion) {
      latest = event.diffusion;
      said.textContent = `step ${latest.step} …`;
      if (drawn) {
        drawn = false;
        requestAnimationFrame(draw);
      }
    }
  }
  draw();
  said.textContent = text || "(the model said nothing)";
  statistics(article, latest, (performance.now() - started) / 1000);
}

async function ask(event) {
  event.preventDefault();
  if (sending || running) return;
  report(null);
  // what is asked is what stands there now, whatever is chosen or typed before the second answer
  const chosen = [...element("panels").children].map(settingsOf);
  const content = [{ type: "text", text: element("question").value }];
  if (upload) content.push({ type: "file", file: { file_id: upload.id } });
  running = new AbortController();
  refreshButtons();
  const articles = prepareAnswers(chosen.length);
  element("answers").scrollIntoView({ block: "nearest" }); // on a phone it lies below the settings
  try {
    // one after the other: answers made together share their steps, and their times would say nothing
    for (const [place, settings] of chosen.entries()) {
      await answer(articles[place], content, settings, running.signal);
    }
  } catch (error) {
    for (const said of document.querySelectorAll(".said")) {
      if (/^(waiting|step)/.test(said.textContent)) said.textContent = error.name === "AbortError" ? "stopped" : "failed";
    }
    if (error.name !== "AbortError") report(error);
  } finally {
    running = null;
    refreshButtons();
  }
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
  for (const panel of panels.children) panel.querySelector("legend").hidden = total === 1;
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
const watchFile = (file) => file && watch(file.name, async () => file);
element("file").onchange = () => watchFile(element("file").files[0]);
const drop = element("drop");
drop.ondragover = (event) => { event.preventDefault(); drop.classList.add("over"); };
drop.ondragleave = () => drop.classList.remove("over");
drop.ondrop = (event) => {
  event.preventDefault();
  drop.classList.remove("over");
  watchFile(event.dataTransfer.files[0]);
};
