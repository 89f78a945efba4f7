"""Two pools of a plan: one computes prompts, and hands what the caches hold of them to another."""
