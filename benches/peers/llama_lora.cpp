// llama.cpp with a LoRA adapter, measured as genie-bench measures: one JSON line per figure. Its own llama-bench knows no adapters.
//
//   llama-lora MODEL.gguf THREADS FLASH CACHE PROMPTS DEPTHS TOKENS ADAPTER.gguf OTHER.gguf
//
// FLASH is 1 or 0, CACHE is f16 or q8_0, PROMPTS and DEPTHS are numbers with commas between. A change of adapter or strength is charged with what the next
// token takes longer than the tokens around it, since llama.cpp does the work then.
#include "llama.h"

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <sstream>
#include <string>
#include <vector>

static double now_ms() {
    return std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

static double median(std::vector<double> values) {
    std::sort(values.begin(), values.end());
    return values[values.size() / 2];
}

static void figure(const std::string & metric, double value) {
    printf("{\"metric\": \"%s\", \"median\": %.6g}\n", metric.c_str(), value);
    fflush(stdout);
}

static std::vector<int> numbers(const std::string & text) {
    std::vector<int> out;
    std::stringstream words(text);
    for (std::string word; std::getline(words, word, ',');) {
        if (!word.empty()) out.push_back(std::stoi(word));
    }
    return out;
}

static void fail(const std::string & what) {
    fprintf(stderr, "llama-lora: %s\n", what.c_str());
    exit(1);
}

struct Bench {
    llama_context * context;
    int n_vocab;

    void clear() { llama_memory_clear(llama_get_memory(context), true); }

    // Runs n pseudo-random ids behind what the cache holds; logits of the last.
    void run(int n) {
        std::vector<llama_token> ids(n);
        for (auto & id : ids) id = rand() % n_vocab;
        if (llama_decode(context, llama_batch_get_one(ids.data(), n)) != 0) fail("llama_decode failed");
        llama_synchronize(context);
    }

    // Milliseconds of one token.
    double step() {
        const double start = now_ms();
        run(1);
        return now_ms() - start;
    }

    void select(llama_adapter_lora * adapter, float scale) {
        if (llama_set_adapters_lora(context, &adapter, 1, &scale) != 0) fail("llama_set_adapters_lora failed");
    }

    double prompt_rate(int n) {
        clear();
        run(n);
        clear();
        const double start = now_ms();
        run(n);
        return n * 1e3 / (now_ms() - start);
    }

    double decode_rate(int depth, int n) {
        clear();
        if (depth > 0) run(depth);
        run(1);
        const double start = now_ms();
        for (int i = 0; i < n; i++) run(1);
        return n * 1e3 / (now_ms() - start);
    }

    // What changing to `a` or `b` in turn adds to a token.
    template <typename Change> double change(Change to) {
        std::vector<double> after, plain;
        clear();
        for (int i = 0; i < 24; i++) {
            to(i % 2 == 0);
            after.push_back(step());
            plain.push_back(step());
        }
        return median(after) - median(plain);
    }
};

int main(int argc, char ** argv) {
    if (argc != 10) fail("need MODEL THREADS FLASH CACHE PROMPTS DEPTHS TOKENS ADAPTER OTHER");
    llama_log_set([](ggml_log_level, const char *, void *) {}, nullptr);
    llama_backend_init();
    llama_model * model = llama_model_load_from_file(argv[1], llama_model_default_params());
    if (!model) fail(std::string("cannot load ") + argv[1]);
    const auto prompts = numbers(argv[5]), depths = numbers(argv[6]);
    const int n_tokens = std::atoi(argv[7]);
    int longest = 64;
    for (int n : prompts) longest = std::max(longest, n);
    for (int n : depths) longest = std::max(longest, n + n_tokens + 1);

    llama_context_params params = llama_context_default_params();
    params.n_ctx = longest;
    params.n_batch = longest;
    params.n_threads = params.n_threads_batch = std::atoi(argv[2]);
    params.flash_attn_type = std::atoi(argv[3]) ? LLAMA_FLASH_ATTN_TYPE_ENABLED : LLAMA_FLASH_ATTN_TYPE_DISABLED;
    if (std::string(argv[4]) == "q8_0") params.type_k = params.type_v = GGML_TYPE_Q8_0;
    Bench bench{llama_init_from_model(model, params), llama_vocab_n_tokens(llama_model_get_vocab(model))};
    if (!bench.context) fail("no context");

    double start = now_ms();
    llama_adapter_lora * adapter = llama_adapter_lora_init(model, argv[8]);
    if (!adapter) fail(std::string("cannot load ") + argv[8]);
    figure("adapter_load", now_ms() - start);
    llama_adapter_lora * other = llama_adapter_lora_init(model, argv[9]);
    if (!other) fail(std::string("cannot load ") + argv[9]);

    bench.select(adapter, 1.0f);
    for (int n : prompts) figure("pp" + std::to_string(n) + "_lora1", bench.prompt_rate(n));
    for (int depth : depths) {
        const std::string metric = "tg" + std::to_string(n_tokens) + "_d" + std::to_string(depth) + "_lora1";
        figure(metric, bench.decode_rate(depth, n_tokens));
    }
    figure("switch", bench.change([&](bool first) { bench.select(first ? adapter : other, 1.0f); }));
    figure("alpha_change", bench.change([&](bool first) { bench.select(adapter, first ? 1.0f : 0.5f); }));
    llama_free(bench.context);
    llama_model_free(model);
    return 0;
}
