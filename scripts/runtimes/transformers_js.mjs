// Greedy tokens of an engine folder by transformers.js: node transformers_js.mjs JOB.json -> one line of JSON. See ../other_runtimes.py.
import fs from "node:fs";
import { AutoModelForCausalLM, AutoTokenizer, Tensor, env } from "@huggingface/transformers";

const job = JSON.parse(fs.readFileSync(process.argv[2]));
env.allowRemoteModels = false;

const tensor = (rows) => new Tensor("int64", BigInt64Array.from(rows.flat().map(BigInt)), [rows.length, rows[0].length]);

const result = { version: env.version };
try {
  const model = await AutoModelForCausalLM.from_pretrained(job.folder, { subfolder: "" });
  const output = await model.generate({
    inputs: tensor(job.ids),
    attention_mask: tensor(job.mask),
    max_new_tokens: job.new,
    do_sample: false,
    eos_token_id: null,
  });
  result.tokens = output.tolist().map((row) => row.slice(job.ids[0].length).map(Number));
  if (job.text) {
    const tokenizer = await AutoTokenizer.from_pretrained(job.folder);
    result.text_ids = tokenizer(job.text, { return_tensor: false }).input_ids;
  }
} catch (error) {
  result.error = String(error.message ?? error);
}
console.log(JSON.stringify(result));
