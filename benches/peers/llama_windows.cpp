// Perplexity of a GGUF in llama.cpp by the golden method of tests/golden: one JSON line.
//
//   llama-windows MODEL.gguf THREADS WINDOW WINDOWS < TEXT
//
// The text's ids (no special tokens) are cut into windows, at most WINDOWS; each starts from an empty cache at position 0 without BOS; its first id is
// not scored. The result is exp of the mean negative natural logarithm of the probabilities. llama.cpp's own llama-perplexity scores
// only the second half of each window.
#include "llama.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <iostream>
#include <iterator>
#include <string>
#include <vector>

static void fail(const char * what) {
    fprintf(stderr, "llama-windows: %s\n", what);
    exit(1);
}

// Natural logarithm of the probability of `id`.
static double log_probability(const float * logits, int n_vocab, llama_token id) {
    const double top = *std::max_element(logits, logits + n_vocab);
    double sum = 0;
    for (int i = 0; i < n_vocab; i++) sum += std::exp(logits[i] - top);
    return logits[id] - top - std::log(sum);
}

int main(int argc, char ** argv) {
    if (argc != 5) fail("usage: llama-windows MODEL.gguf THREADS WINDOW WINDOWS < TEXT");
    const int threads = atoi(argv[2]), window = atoi(argv[3]), windows = atoi(argv[4]);
    const std::string text{std::istreambuf_iterator<char>(std::cin), {}};

    llama_log_set([](ggml_log_level, const char *, void *) {}, nullptr);
    llama_model * model = llama_model_load_from_file(argv[1], llama_model_default_params());
    if (!model) fail("cannot load the model");
    const llama_vocab * vocab = llama_model_get_vocab(model);
    std::vector<llama_token> ids(text.size() + 1);
    const int n_ids = llama_tokenize(vocab, text.data(), text.size(), ids.data(), ids.size(), false, false);
    if (window < 2 || n_ids < window) fail("fewer ids than one window of at least 2");
    ids.resize(std::min<long>(n_ids, (long) window * windows));
    llama_context_params params = llama_context_default_params();
    params.n_ctx = params.n_batch = params.n_ubatch = window;
    params.n_threads = params.n_threads_batch = threads;
    llama_context * context = llama_init_from_model(model, params);
    if (!context) fail("cannot make a context");
    const int n_vocab = llama_vocab_n_tokens(vocab);

    double sum = 0;
    size_t scored = 0;
    llama_batch batch = llama_batch_init(window, 0, 1);
    for (size_t start = 0; start + window <= ids.size(); start += window) {
        llama_memory_clear(llama_get_memory(context), true);
        batch.n_tokens = window - 1;
        for (int i = 0; i < batch.n_tokens; i++) {
            batch.token[i] = ids[start + i];
            batch.pos[i] = i;
            batch.n_seq_id[i] = 1;
            batch.seq_id[i][0] = 0;
            batch.logits[i] = true;
        }
        if (llama_decode(context, batch) != 0) fail("llama_decode failed");
        for (int i = 0; i < batch.n_tokens; i++, scored++) {
            sum -= log_probability(llama_get_logits_ith(context, i), n_vocab, ids[start + i + 1]);
        }
    }
    printf("{\"metric\": \"perplexity\", \"value\": %.6g, \"scored_ids\": %zu}\n", std::exp(sum / scored), scored);
}
