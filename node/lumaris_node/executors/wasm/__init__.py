"""Tier `wasm`: WebAssembly in a process of its own for each lease, counted and deterministic."""
