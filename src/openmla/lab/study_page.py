"""The page of `openmla study`."""

from __future__ import annotations

from openmla.lab import plot
from openmla.lab.page import Figure, Page, Section, Table, Tile, amount, duration, number
from openmla.lab.study import LENGTHS, WORKLOADS, Study, losses

_BYTES = 2


def page(found: Study) -> Page:
    """Forms, lengths, workloads, money, models, precision, stability, latent size."""
    mla, mha = found.forms[0], found.forms[-1]
    ratio = mha.kv_numbers / mla.kv_numbers
    roof = found.roof
    tiles = [
        Tile(f"{ratio:.3g}x", f"less KV than MHA with {found.h_q} heads"),
        Tile(f"{mla.kv_numbers * _BYTES:,} B", "per token and layer in bf16"),
        Tile(f"{roof.ridge('bf16'):.3g}", f"FLOP per byte at the ridge of {roof.device}"),
    ]
    lead = (
        f"Four forms of attention with {found.h_q} query heads and DeepSeek-V3's head sizes. Times and costs are those of the roof "
        f"of {roof.device} ({roof.source}), attention alone: what no kernel beats, not what one reaches. Precision and the latent "
        f"sweep were measured on {found.machine}."
    )
    sections = [_forms(found), _lengths(found), _workloads(found), _money(found), _models(found), _precision(found),
                _stability(found), _latent(found), *_trained(found)]  # fmt: skip
    return Page("MLA against MHA, GQA and MQA", lead, sections, tiles, ["Made by `openmla study`."])


def _forms(found: Study) -> Section:
    mla = found.forms[0]
    first = {each.form: each for each in found.steps if each.workload == WORKLOADS[0].name}
    rows = [
        [form.name, f"{form.kv_numbers:,}", f"{form.kv_numbers * _BYTES:,}", f"{form.kv_numbers / mla.kv_numbers:.3g}x",
         f"{first[form.name].intensity:.3g}", first[form.name].bound]
        for form in found.forms
    ]  # fmt: skip
    text = (
        "Ordinary attention reads each number once per query head that shares it; MLA reads one latent for all heads, twice: as "
        "key and as value. So it does far more arithmetic for each byte, and is nearest to the ridge where the others wait for "
        "memory. MQA keeps less still; what it gives up is quality, which no roofline shows (arXiv 2405.04434, appendix D)."
    )
    head = ("form", "numbers kept", "bytes per token", "against MLA", "FLOP per byte", "bound by")
    return Section("What a token costs to keep and to read", [text], tables=[Table("forms", head, rows, left=(0, 5))])


def _lengths(found: Study) -> Section:
    def line(value: str, unit: float) -> list[plot.Line]:
        return [
            plot.Line(
                form.name,
                [(each.s_k, getattr(each, value) / unit) for each in found.lengths if each.form == form.name],
                i,
            )
            for i, form in enumerate(found.forms)
        ]

    kept = plot.lines(line("kv_bytes", 2**20), salt="kept", title="KV memory against context length", is_log=True,
                      heading="MiB of KV, one request and layer")  # fmt: skip
    took = plot.lines(line("seconds", 1e-6), salt="took", title="Time of a decode step at the roof", is_log=True,
                      heading=f"us per layer at the roof of {found.roof.device}")  # fmt: skip
    return Section(
        "Against context length",
        [f"One request, one token per step, {LENGTHS[0] // 1024}k to {LENGTHS[-1] // 1024}k tokens."],
        [
            Figure(kept, "Lower is better."),
            Figure(took, "Lower is better. Launching a kernel is not in it."),
        ],
    )


def _workloads(found: Study) -> Section:
    rows = []
    for load in WORKLOADS:
        for each in (each for each in found.steps if each.workload == load.name):
            rows.append([
                load.name if each.form == found.forms[0].name else "", f"{load.batch} x {load.s_k:,}", each.form,
                f"{each.flops / 1e9:.3g}", amount(each.bytes), f"{each.intensity:.3g}", each.bound, duration(each.seconds),
            ])  # fmt: skip
    head = ("workload", "requests x keys", "form", "GFLOP", "bytes", "FLOP per byte", "bound by", "at the roof")
    text = "One decode step of one layer. Batch does not change FLOP per byte of attention, since every request has its own KV."
    return Section("Workloads", [text], tables=[Table("workloads", head, rows, left=(0, 1, 2, 6))])


def _money(found: Study) -> Section:
    rows = []
    for load in WORKLOADS:
        for each in (each for each in found.prices if each.workload == load.name):
            rows.append([
                load.name if each.form == found.forms[0].name else "", each.form, number(each.tokens_per_second),
                number(each.per_million), number(each.kv_gib), number(each.cards_for_kv, 2),
            ])  # fmt: skip
    head = ("workload", "form", "tokens per second", "cost of a million tokens", "KV GiB", "cards that KV fills")
    text = (
        f"{found.layers} layers, {found.per_hour:g} per card and hour (`--price`), {found.memory_gib:g} GiB per card (`--memory`). "
        "Attention alone, at the roof, on one card: a lower bound of that part of the bill. Speculation counts every draft as accepted."
    )
    return Section("Cost per million tokens", [text], tables=[Table("cost", head, rows, left=(0, 1))])


def _models(found: Study) -> Section:
    rows = [
        [each.name, each.kind.upper(), f"{each.parameters:g}", str(each.layers), str(each.form.h_q), f"{each.form.kv_numbers:,}",
         f"{each.kv_bytes / 1024:.4g}", f"{each.kv_bytes * 32768 / 2**30:.3g}", each.source]
        for each in found.models
    ]  # fmt: skip
    head = ("model", "form", "10^9 parameters", "layers", "heads", "numbers per token and layer", "KiB per token", "GiB at 32k",
            "source")  # fmt: skip
    order = sorted(found.models, key=lambda each: each.kv_bytes)
    picture = plot.bars(
        [(f"{each.name}, {each.kind.upper()}", each.kv_bytes / 1024) for each in order], salt="models",
        title="KV bytes per token of published models", heading="KiB per token, all layers, bf16",
    )  # fmt: skip
    text = "From 2 to 671 billion parameters: the KV of a token depends on the form, not on the size of the model."
    return Section(
        "Published models", [text], [Figure(picture, "Lower is better.")], [Table("models", head, rows, left=(0, 1, 8))]
    )


def _precision(found: Study) -> Section:
    rows = [[each.way, f"{each.s_k:,}", f"{each.arithmetic:.2e}", f"{each.total:.2e}"] for each in found.precision]
    text = (
        "Relative root mean square against fp64 on standard normal numbers, 16 heads. Arithmetic: the result against fp64 on the "
        "numbers as stored. Total: against fp64 on the numbers before they were stored. With bf16, storing costs more than computing."
    )
    return Section("Precision", [text], tables=[Table("precision", ("form", "keys", "arithmetic", "total"), rows)])


def _stability(found: Study) -> Section:
    rows = [
        [f"{each.factor:g}x", f"{each.largest_score:,.1f}", f"{each.ours:.2e}", f"{100 * each.lost_fp16:.0f} %",
         f"{100 * each.lost_fp32:.0f} %"]
        for each in found.stability
    ]  # fmt: skip
    text = (
        "Scores grow, as they do in trained models with outliers. A softmax that does not subtract the maximum first loses rows to "
        "overflow; the online softmax keeps a running maximum and loses none."
    )
    head = ("scores", "largest", "error of ours", "rows lost in fp16", "rows lost in fp32")
    return Section("Stability", [text], tables=[Table("stability", head, rows)])


def _latent(found: Study) -> Section:
    rows = [
        [
            str(each.d_latent),
            f"{each.kv_bytes:,}",
            f"{each.compression:.3g}x",
            f"{each.intensity:.3g}",
            duration(each.seconds),
        ]
        for each in found.latents
    ]
    head = ("latent", "bytes per token", "less than MHA, 16 heads", "FLOP per byte", "decode here")
    text = (
        "Latent sizes with 64 RoPE columns and 16 heads; one decode of 4,096 keys in bf16 on this CPU. Bytes, FLOPs and time grow "
        "with the latent alike. What a smaller latent costs in quality is a question to trained models (`--trained`)."
    )
    return Section("Latent size", [text], tables=[Table("latent", head, rows)])


def _trained(found: Study) -> list[Section]:
    if not found.trained:
        return []
    every = losses(found.trained)
    points: dict[str, list[tuple[float, float]]] = {}
    for form, _, kept, loss, _ in every:
        points.setdefault(form.upper(), []).append((kept, loss))
    svg = plot.scatter(
        points, salt="trained", title="Loss against numbers kept per token", heading="loss, nats per byte",
        x_label="numbers kept per token and layer",
    )  # fmt: skip
    rows = [
        [form.upper(), str(size), str(kept), f"{loss:.4f}", f"{spread:.4f}" if spread else "-"]
        for form, size, kept, loss, spread in every
    ]
    first = found.trained[0]
    seeds = len({each.seed for each in found.trained})
    text = (
        f"Byte-level models of about {first.parameters / 1e6:.1f} million parameters, equal but for their attention, {first.steps} steps each, "
        f"{seeds} seed{'s' if seeds > 1 else ''}, on the source of Python's library (`openmla.lab.quality`). Small and short-trained: read the "
        "order and the shape of the curve, not the numbers."
    )
    head = ("form", "latent or KV heads", "numbers kept", "loss", "between seeds")
    table = Table("trained models", head, rows)
    return [Section("Latent size against loss", [text], [Figure(svg, "Lower and further left is better.")], [table])]
