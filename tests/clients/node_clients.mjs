// One client in JavaScript: node node_clients.mjs NAME URL KEY ANSWER, or --list.
// See check_clients.py. Each finishes a loop with one tool, whole and streamed.

import { readFileSync } from "node:fs";

const names = ["ai-sdk-openai-compatible", "ai-sdk-openai", "ai-sdk-openai-responses", "ai-sdk-anthropic"];
const [name, url, apiKey, answer] = process.argv.slice(2);

async function modelOf() {
  const baseURL = `${url}/v1`;
  if (name === "ai-sdk-openai-compatible") {
    const { createOpenAICompatible } = await import("@ai-sdk/openai-compatible");
    return createOpenAICompatible({ name: "m", baseURL, apiKey })("m");
  }
  if (name === "ai-sdk-anthropic") {
    const { createAnthropic } = await import("@ai-sdk/anthropic");
    return createAnthropic({ baseURL, apiKey })("m");
  }
  const { createOpenAI } = await import("@ai-sdk/openai");
  const openai = createOpenAI({ baseURL, apiKey });
  return name === "ai-sdk-openai" ? openai.chat("m") : openai.responses("m");
}

function versionOf(pkg) {
  return JSON.parse(readFileSync(new URL(`node_modules/${pkg}/package.json`, import.meta.url))).version;
}

if (name === "--list") {
  console.log(names.join(" "));
} else {
  const { generateText, streamText, stepCountIs, tool } = await import("ai");
  const { z } = await import("zod");
  const tools = {
    get_weather: tool({
      description: "The weather now.",
      inputSchema: z.object({ city: z.string() }),
      execute: async () => "21 degrees",
    }),
  };
  const options = {
    model: await modelOf(),
    tools,
    prompt: "How is the weather in Paris?",
    stopWhen: stepCountIs(4),
    maxRetries: 0,
    providerOptions: { openai: { store: false } },
  };
  const whole = await generateText(options);
  const stream = streamText(options);
  await stream.consumeStream();
  const streamed = await stream.text;
  if (whole.text !== answer || streamed !== answer) {
    throw new Error(`${JSON.stringify(whole.text)} and ${JSON.stringify(streamed)}`);
  }
  const pkg = `@ai-sdk/${name.slice(7).replace("-responses", "")}`;
  console.log(`${pkg} ${versionOf(pkg)}: ${whole.text}`);
}
