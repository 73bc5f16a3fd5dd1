"""Models as files of llama.cpp (GGUF), and llama.cpp as an engine that scores them."""
