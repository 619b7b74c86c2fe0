// Greedy tokens by transformers.js, which reads the engine folder itself: node transformers_js.mjs JOBS.json. See ../other_runtimes.py.
import fs from "node:fs";
import { AutoModelForCausalLM, AutoTokenizer, Tensor, env } from "@huggingface/transformers";

env.allowRemoteModels = false;

const tensor = (rows) => new Tensor("int64", BigInt64Array.from(rows.flat().map(BigInt)), [rows.length, rows[0].length]);

async function run(job) {
  // The graph lies in the folder itself; all else is in its config.json.
  const model = await AutoModelForCausalLM.from_pretrained(job.folder, { subfolder: "" });
  const output = await model.generate({
    inputs: tensor(job.ids),
    attention_mask: tensor(job.mask),
    max_new_tokens: job.new_tokens,
    do_sample: false,
    eos_token_id: null,
  });
  const tokens = output.tolist().map((row) => row.slice(job.ids[0].length).map(Number));
  if (job.text === null) return { tokens };
  const tokenizer = await AutoTokenizer.from_pretrained(job.folder);
  return { tokens, text_ids: tokenizer(job.text, { return_tensor: false }).input_ids };
}

const results = [];
console.error = () => {}; // the library prints a refused run's inputs
for (const job of JSON.parse(fs.readFileSync(process.argv[2]))) {
  results.push(await run(job).catch((error) => ({ error: String(error.message ?? error) })));
}
console.log(JSON.stringify({ version: `transformers.js ${env.version}`, results }));
