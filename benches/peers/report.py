#!/usr/bin/env python3
"""From figures to records, tables and Markdown.

    report.py RECORD.jsonl      # prints a record of compare.py as the table of the README
"""
import json, re, statistics, sys

median = statistics.median


class Figures:
    """All values: contender -> metric -> variant -> one value per round."""

    def __init__(self):
        self.values = {}

    def add(self, name, metric, variant, value):
        self.of(name).setdefault(metric, {}).setdefault(variant, []).append(value)

    def of(self, name):
        return self.values.setdefault(name, {})


def lines(figures, costs, limits):
    """One record per metric: of each contender the best variant; of each genie the ratio to its best peer and the share of the limit."""
    metrics = list(dict.fromkeys(metric for own in figures.values.values() for metric in own))
    for metric in metrics:
        line = {"metric": metric}
        for name, own in figures.values.items():
            if metric in own:
                variant, value = median_of_best(metric, own[metric])
                values = own[metric][variant]
                line[name] = {"median": value, "min": min(values), "max": max(values)} | ({"variant": variant} if variant else {})
        for name in (name for name in line if name.startswith("genie")):
            own = line[name]
            if (peers := [line[peer]["median"] for peer in line if is_peer(peer, name)]) and not metric.startswith(UNLIKE):
                own["to_best_peer"] = own["median"] / (min(peers) if is_cost(metric) else max(peers))
            if name != "genie" and "genie" in line:
                own["to_genie"] = own["median"] / line["genie"]["median"]
            if base := without_adapter(metric, figures.of(name)):
                own["to_base"] = own["median"] / base
            own.update(share_of_limit(metric, own["median"], costs.get(name, {}).get(metric), limits))
        yield line


def is_peer(name, ours):
    """Whether `name` is measured against `ours`: a peer built for AVX2 only meets genie's tier for it, and no other does."""
    return name != "metric" and not name.startswith("genie") and name.endswith(" avx2") == ours.endswith(" avx2")


def is_cost(metric):
    return metric.startswith(("start_to", "ttft", "peak_rss", "rss", "load_model", "switch", "alpha_change", "adapter_"))


def median_of_best(metric, variants):
    medians = [(variant, median(values)) for variant, values in variants.items()]
    return (min if is_cost(metric) else max)(medians, key=lambda pair: pair[1])


def is_near(metric, value, best):
    """Whether `value` may become the best one, as noise goes."""
    return value <= best * 1.15 if is_cost(metric) else best <= value * 1.15


def without_adapter(metric, own):
    base = own.get(re.sub(r"_lora1_r\d+$", "", metric)) if "_lora1_" in metric else None
    return median_of_best(metric, base)[1] if base else None


def share_of_limit(metric, rate, cost, limits):
    """Decode: of the bandwidth of reading, on the pages that are faster. Prompts: of the 8-bit products of the tier in use, where
    16-bit activations need two."""
    if not cost or not limits:
        return {}
    read = max(limits.get("read_bytes_per_s", 0), limits.get("read_bytes_per_s_large_pages", 0))
    if metric.startswith("tg") and read:
        return {"share_of_read_limit": rate * cost["bytes_per_token"] / read}
    if metric.startswith("pp") and (limit := limits.get(f"int8_multiply_adds_per_s_{cost['kernels']}")):
        return {"share_of_multiply_limit": rate * cost["weight_products_per_token"] * cost["planes"] / limit}
    return {}


def write(lines, path):
    text = "".join(json.dumps(line) + "\n" for line in lines)
    if path:
        with open(path, "w") as file:
            file.write(text)
    else:
        print(text, end="")


def table(lines):
    """All metrics and contenders, for a terminal."""
    header, *rows = lines
    names = list(dict.fromkeys(name for row in rows for name in row if name != "metric"))
    width = max(14, *(len(name) + 2 for name in names))
    out = [f"{'metric':<28}" + "".join(f"{name:>{width}}" for name in names)]
    for row in rows:
        cells = "".join(f"{short(row.get(name, {}).get('median'), 2):>{width}}" for name in names)
        out.append(f"{row['metric']:<28}{cells}  {'; '.join(notes(row))}".rstrip())
    limits = ", ".join(f"{name} {value / 1e9:.1f} G" for name, value in header["limits"].items())
    return "\n".join(out + [f"limits: {limits}"])


def notes(row):
    """What the figures of each genie mean."""
    words = {"to_best_peer": "{:.3g} x best peer", "to_genie": "{:.3g} x genie", "to_base": "{:.3f} x without adapter",
             "share_of_read_limit": "{:.0%} of read limit", "share_of_multiply_limit": "{:.0%} of multiply limit"}
    for name in (name for name in row if name.startswith("genie")):
        if said := [text.format(row[name][key]) for key, text in words.items() if key in row[name]]:
            yield f"{name}: {', '.join(said)}"


def markdown(lines):
    """The table of the README: what every contender has, in words."""
    header, *rows = lines
    by_metric = {row["metric"]: row for row in rows}
    names = [name for name in dict.fromkeys(name for row in rows for name in row) if name in TITLES]
    ours = [name for name in names if name.startswith("genie")]
    heads = [TITLES[name] for name in names] + [f"{TITLES[name]} to best" for name in ours]
    out = ["| | " + " | ".join(heads) + " |", "| --- |" + " --- |" * len(heads)]
    for title, pattern, unit in README:
        found = [metric for metric in by_metric if re.fullmatch(pattern, metric)]
        if not found:
            continue
        label = f"{title} {' / '.join(re.search(r'[0-9]+$', metric)[0] for metric in found)} ({unit})" if unit else title
        cells = [" / ".join(short(by_metric[metric].get(name, {}).get("median")) for metric in found) for name in names]
        ratios = [" / ".join(short(by_metric[metric].get(name, {}).get("to_best_peer"), 2) for metric in found) for name in ours]
        out.append(f"| {label} | " + " | ".join([*cells, *ratios]) + " |")
    about = f"{header['machine']}, {header['threads']} threads, {header['model']}, {header['rounds']} rounds, {header['date']}"
    if header["others_used_cores"] > 0.1:
        about += f"; other processes used up to {header['others_used_cores']:.1f} cores"
    return "\n".join([*out, "", about])


def short(value, digits=0):
    """So many decimals; a number that they would make 0 with one figure that is not."""
    if value is None:
        return "–"
    return f"{value:.{digits}f}" if 10**-digits <= abs(value) or value == 0 else f"{value:.1g}"


# What a change costs: genie's until the next step's first kernel, llama.cpp's as what the next token takes longer.
UNLIKE = ("switch", "alpha_change")
TITLES = {"genie": "genie", "genie q4_0": "genie, Q4_0", "genie lpbq": "genie, LPBQ", "llama.cpp": "llama.cpp", "openvino": "OpenVINO GenAI"}
README = (
    ("decode behind", r"tg\d+_d\d+", "tokens/s"),
    ("prefill of", r"pp\d+", "tokens/s"),
    ("decode with an adapter of rank", r"tg\d+_d0_lora1_r\d+", "tokens/s"),
    ("prefill of 512 with an adapter of rank", r"pp512_lora1_r\d+", "tokens/s"),
    ("process start to first token, prompt of", r"start_to_first_token_p\d+", "ms"),
    ("peak memory, prompt of", r"peak_rss_p\d+", "MB"),
    ("change of adapter, rank", r"switch_r\d+", "ms"),
    ("change of strength, rank", r"alpha_change_r\d+", "ms"),
)

if __name__ == "__main__":
    with open(sys.argv[1]) as record:
        print(markdown([json.loads(line) for line in record]))
