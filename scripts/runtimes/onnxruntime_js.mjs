// Greedy tokens by ONNX Runtime in JavaScript, with a loop of its own around the graph:
// node onnxruntime_js.mjs JOBS.json onnxruntime-node|onnxruntime-web. See ../other_runtimes.py.
import fs from "node:fs";
import path from "node:path";

const [jobs, library] = process.argv.slice(2);
const ort = await import(library);
const int64 = (rows) => new ort.Tensor("int64", BigInt64Array.from(rows.flat().map(BigInt)), [rows.length, rows[0].length]);

async function open(folder) {
  const graph = path.join(folder, "model.onnx");
  const options = { logSeverityLevel: 4 };
  if (library === "onnxruntime-node") return ort.InferenceSession.create(graph, options);
  // WebAssembly opens no files: graph and weights come as bytes.
  const weights = `${graph}_data`;
  if (fs.existsSync(weights)) options.externalData = [{ path: path.basename(weights), data: fs.readFileSync(weights) }];
  return ort.InferenceSession.create(fs.readFileSync(graph), options);
}

function positions(mask, count) {
  return mask.map((row) => {
    let real = 0;
    return row.map((bit) => (bit ? real++ : 0)).slice(-count);
  });
}

function best(logits, row) {
  const [, steps, vocabulary] = logits.dims;
  const start = (row * steps + steps - 1) * vocabulary;
  let winner = 0;
  for (let i = 1; i < vocabulary; i++) if (logits.data[start + i] > logits.data[start + winner]) winner = i;
  return winner;
}

async function run(job) {
  const session = await open(job.folder);
  const nothing = { float32: new Float32Array(0), float16: new Uint16Array(0) };
  let past = {};
  for (const { name, shape, type } of session.inputMetadata) {
    if (name.startsWith("past")) past[name] = new ort.Tensor(type, nothing[type], [job.ids.length, shape[1], 0, shape[3]]);
  }
  const tokens = job.ids.map(() => []);
  let ids = job.ids;
  let mask = job.mask;
  for (let step = 0; step < job.new_tokens; step++) {
    const feeds = { input_ids: int64(ids), attention_mask: int64(mask), position_ids: int64(positions(mask, ids[0].length)), ...past };
    const out = await session.run(feeds);
    ids = tokens.map((row, i) => [best(out.logits, i)]);
    ids.forEach((next, i) => tokens[i].push(next[0]));
    mask = mask.map((row) => [...row, 1]);
    past = Object.fromEntries(Object.keys(past).map((name) => [name, out[name.replace("past_key_values", "present")]]));
  }
  return { tokens };
}

const results = [];
for (const job of JSON.parse(fs.readFileSync(jobs))) {
  results.push(await run(job).catch((error) => ({ error: String(error.message ?? error) })));
}
console.log(JSON.stringify({ version: `${library} ${ort.env.versions.common}`, results }));
