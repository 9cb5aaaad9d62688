"""Drawing A: one optimizer step of TP2 x PP2 x DP2, with a column for each of the eight ranks.

Ranks are numbered as `nvlm_train.parallel.topology` numbers them: tensor fastest, then data, then
pipeline. Types have the names that they have in the code.
"""

from __future__ import annotations

from svg import SOFT, Paint, Sheet

GUTTER, RANK, PAIR_GAP, STAGE_GAP, REPLICA_GAP, MARGIN = 212, 84, 6, 90, 40, 24
PAIR = 2 * RANK + PAIR_GAP
REPLICA = 2 * PAIR + STAGE_GAP
WIDTH = GUTTER + 2 * REPLICA + REPLICA_GAP + MARGIN
HEIGHT = 1216

REPLICAS = (Paint("#e6eefb", "#4a76b8"), Paint("#e5f3ea", "#4b8f62"))
"""Of the two model replicas."""
WORLD = Paint("#efede8", "#b9bcc2")
"""What all ranks do together."""
BACKWARD = "#8a5bb5"
"""Gradients."""

SLOT = 17
FIRST_STAGE = ((0, "F1"), (1, "F2"), (3, "B1"), (4, "F3"), (5, "B2"), (7, "B3"))
LAST_STAGE = ((1, "F1"), (2, "B1"), (3, "F2"), (4, "B2"), (5, "F3"), (6, "B3"))
"""Three microbatches under 1F1B: the time slot of each forward and backward pass."""
SENT_FORWARD = ((0, 1), (1, 3), (4, 5))
SENT_BACK = ((2, 3), (4, 5), (6, 7))
"""From which slot of the one stage to which of the other."""


def pair_left(replica: int, stage: int) -> float:
    """Where the two tensor-parallel ranks of a stage begin."""
    return GUTTER + replica * (REPLICA + REPLICA_GAP) + stage * (PAIR + STAGE_GAP)


def middle(replica: int, stage: int, tensor: int) -> float:
    """The middle of a rank's column."""
    return pair_left(replica, stage) + tensor * (RANK + PAIR_GAP) + RANK / 2


PAIRS = [(replica, stage) for replica in (0, 1) for stage in (0, 1)]
RANKS = [(replica, stage, tensor) for replica, stage in PAIRS for tensor in (0, 1)]


def draw() -> bytes:
    """The drawing's file."""
    sheet = Sheet(WIDTH, HEIGHT, "One optimizer step of TP2 x PP2 x DP2")
    _heading(sheet)
    _rows(sheet)
    _data(sheet)
    _encoding(sheet)
    _all_to_all(sheet)
    for replica in (0, 1):
        _schedule(sheet, replica)
        _loss(sheet, replica)
    _reduction(sheet)
    _end(sheet)
    return sheet.to_bytes()


def _heading(sheet: Sheet) -> None:
    sheet.text(24, 38, "One optimizer step: TP2 x PP2 x DP2", size=20, anchor="start", face="bold")
    about = (
        "A column is a rank, and time runs downward. Words in code's font are types and tensors."
    )
    about += " Ranks are numbered tensor first, then data, then pipeline."
    sheet.text(24, 60, about, colour=SOFT, anchor="start")
    for replica in (0, 1):
        left = pair_left(replica, 0)
        words = f"model replica {replica} (data-parallel rank {replica})"
        sheet.text(left + REPLICA / 2, 94, words, face="bold", colour=REPLICAS[replica].edge)
        sheet.line([(left, 101), (left + REPLICA, 101)], colour=REPLICAS[replica].edge)
    for replica, stage in PAIRS:
        left = pair_left(replica, stage)
        sheet.text(left + PAIR / 2, 118, f"pipeline stage {stage}", size=12, colour=SOFT)
    for replica, stage, tensor in RANKS:
        number = tensor + 2 * replica + 4 * stage
        sheet.text(middle(replica, stage, tensor), 138, f"rank {number}", face="bold")


ROWS = (
    (150, "plan", "data/plan/plan.py", ("each alone, all the same",)),
    (232, "read", "data/loading/loader.py", ("threads make steps ahead",)),
    (326, "agree", "train/step.py", ("two small all-reduces",)),
    (424, "encode", "vision/tile_parallel.py", ("every rank has a whole encoder",)),
    (510, "all-to-all", "vision/tile_parallel.py", ("in each replica,", "to its first stage")),
    (620, "1F1B", "pipeline/round.py", ("megatron-core's schedule,", "round after round")),
    (842, "loss", "pipeline/loss.py", ("inside each forward pass", "of the last stage")),
    (920, "reduce", "train/step.py", ("megatron-core's DDP, between", "equal stages of the replicas")),
    (992, "measure", "train/reduce_metrics.py", ("one all-reduce of the world",)),
    (1066, "update", "train/optimizer.py", ("all ranks, or none",)),
    (1150, "log", "train/tracking/tracker.py", ("on rank 0 alone",)),
)  # fmt: skip
"""Where a row begins, its name, the file to read, and a remark."""


def _rows(sheet: Sheet) -> None:
    for top, name, file, remarks in ROWS:
        sheet.line([(24, top - 4), (WIDTH - MARGIN, top - 4)], colour="#e6e4df")
        sheet.text(24, top + 18, name, size=15, anchor="start", face="bold")
        sheet.text(24, top + 34, file, size=10.5, anchor="start", face="code")
        for number, remark in enumerate(remarks):
            sheet.text(24, top + 49 + 14 * number, remark, size=11, colour=SOFT, anchor="start")


def _each(sheet: Sheet, y: float, height: float, *lines: str) -> None:
    """The same box for every rank."""
    for replica, stage, tensor in RANKS:
        x = middle(replica, stage, tensor) - RANK / 2
        sheet.box(x, y, RANK, height, REPLICAS[replica])
        for number, words in enumerate(lines):
            sheet.text(x + RANK / 2, y + 18 + 15 * number, words, size=12)


def _down(sheet: Sheet, y: float, end: float, words: str, pairs: list[tuple[int, int]]) -> None:
    """Arrows in the columns of these stages, and between each two of them what flows."""
    for replica, stage in pairs:
        for tensor in (0, 1):
            x = middle(replica, stage, tensor)
            sheet.arrow([(x, y), (x, end)], colour=REPLICAS[replica].edge)
        sheet.label(pair_left(replica, stage) + PAIR / 2, (y + end) / 2, words)


def _data(sheet: Sheet) -> None:
    _each(sheet, 154, 28, "step n")
    _down(sheet, 182, 232, "StepPlan", PAIRS)
    _each(sheet, 232, 44, "text: all", "tiles: 1/4")
    _down(sheet, 276, 326, "StepBatch", PAIRS)
    for replica in (0, 1):
        left = pair_left(replica, 0)
        sheet.box(left, 326, REPLICA, 26, REPLICAS[replica])
        words = "samples whose image cannot be decoded lose their labels"
        sheet.text(left + REPLICA / 2, 343, words, size=12)
    _world(sheet, 356, "trained tokens of the whole step, the divisor of the loss")


def _world(sheet: Sheet, y: float, words: str) -> None:
    """A bar through all columns."""
    left = pair_left(0, 0)
    sheet.box(left, y, WIDTH - MARGIN - left, 26, WORLD)
    sheet.text((left + WIDTH - MARGIN) / 2, y + 17, words, size=12)


def _encoding(sheet: Sheet) -> None:
    _down(sheet, 382, 424, "pixels_TCEE", PAIRS)
    for replica in (0, 1):
        x = pair_left(replica, 0) + PAIR + STAGE_GAP / 2
        sheet.text(x, 399, "uint8 tiles", size=11, colour=SOFT)
        sheet.text(x, 413, "of a Round", size=11, colour=SOFT)
    _each(sheet, 424, 44, "own tiles,", "no gradient")
    _down(sheet, 468, 510, "features", PAIRS)


def _all_to_all(sheet: Sheet) -> None:
    top, bottom = 510, 566
    for replica in (0, 1):
        left = pair_left(replica, 0)
        for stage in (0, 1):
            for tensor in (0, 1):
                start = (middle(replica, stage, tensor), top)
                for receiver in (0, 1):
                    sheet.line(
                        [start, (middle(replica, 0, receiver), bottom)],
                        colour=REPLICAS[replica].edge,
                    )
        sheet.text(left + PAIR + 6, 590, "of all tiles", size=11, colour=SOFT, anchor="start")
        sheet.text(left + PAIR + 6, 604, "of the round", size=11, colour=SOFT, anchor="start")
    _down(sheet, bottom, 616, "features", [(0, 0), (1, 0)])


def _schedule(sheet: Sheet, replica: int) -> None:
    top, slots = 616, 660
    heads = (
        ("projector, splice,", "first half of the layers"),
        ("last half of the layers,", "logits"),
    )
    for stage, passes in ((0, FIRST_STAGE), (1, LAST_STAGE)):
        left = pair_left(replica, stage)
        height = slots - top + 8 * SLOT + 8
        sheet.box(left, top, PAIR, height, REPLICAS[replica])
        for number, words in enumerate(heads[stage]):
            sheet.text(left + PAIR / 2, top + 17 + 15 * number, words, size=12)
        for slot, name in passes:
            _pass(sheet, left + 8, slots + slot * SLOT, name, replica)
    _sent(sheet, replica, slots)


def _pass(sheet: Sheet, x: float, y: float, name: str, replica: int) -> None:
    colour = REPLICAS[replica].edge if name[0] == "F" else BACKWARD
    sheet.box(x, y, PAIR - 16, SLOT - 2, Paint(colour, colour), radius=2)
    words = f"{'forward' if name[0] == 'F' else 'backward'}, microbatch {name[1]}"
    sheet.text(x + PAIR / 2 - 8, y + 11.5, words, size=11, colour="#ffffff")


def _sent(sheet: Sheet, replica: int, slots: float) -> None:
    """What goes from stage to stage and back."""
    left, right = pair_left(replica, 0) + PAIR - 6, pair_left(replica, 1) + 6
    for start, end in SENT_FORWARD:
        points = [(left, slots + (start + 0.5) * SLOT), (right, slots + (end + 0.5) * SLOT)]
        sheet.arrow(points, colour=REPLICAS[replica].edge)
    for start, end in SENT_BACK:
        points = [(right, slots + (start + 0.5) * SLOT), (left, slots + (end + 0.5) * SLOT)]
        sheet.arrow(points, colour=BACKWARD)
    x = (left + right) / 2
    sheet.text(x, slots - 16, "hidden_SBH", size=11.5, face="code")
    sheet.text(x, slots - 3, "X, H: + context", size=10.5, colour=SOFT)
    sheet.text(x, slots + 8 * SLOT, "their gradient", size=11, colour=BACKWARD)


def _loss(sheet: Sheet, replica: int) -> None:
    left, top = pair_left(replica, 1), 844
    _down(sheet, 804, top, "logits", [(replica, 1)])
    sheet.box(left, top, PAIR, 44, REPLICAS[replica])
    sheet.text(left + PAIR / 2, top + 18, "sum of cross-entropies", size=12)
    sheet.text(left + PAIR / 2, top + 33, "/ trained tokens of the step", size=11)


def _reduction(sheet: Sheet) -> None:
    """Gradients meet between the replicas; the losses pass by on their way."""
    for stage, tensor in ((0, 0), (0, 1), (1, 0), (1, 1)):
        y = 934 + 11 * (2 * stage + tensor)
        start = 804 if stage == 0 else 888
        ends = [(middle(replica, stage, tensor), y) for replica in (0, 1)]
        sheet.line(ends, colour=BACKWARD)
        for x, _ in ends:
            sheet.line([(x, start), (x, y)], colour=BACKWARD)
            sheet.dot(x, y, colour=BACKWARD)
    for replica in (0, 1):
        x = pair_left(replica, 0) + PAIR / 2
        sheet.label(x, 862, "gradients", colour=BACKWARD)
        sheet.text(x, 884, "fp32", size=11, colour=BACKWARD)
        last = pair_left(replica, 1) + PAIR / 2
        sheet.arrow([(last, 888), (last, 994)], colour=REPLICAS[replica].edge)
        sheet.label(last, 908, "LabelLosses")


def _end(sheet: Sheet) -> None:
    _world(
        sheet,
        994,
        "loss by source, tokens, tiles, samples; and is every rank's gradient norm finite?",
    )
    _down(sheet, 1020, 1066, "StepResult", PAIRS)
    _each(sheet, 1066, 44, "if finite:", "clip, AdamW")
    x, right = middle(0, 0, 0), pair_left(0, 0) + PAIR
    sheet.arrow([(x, 1110), (x, 1152)], colour=REPLICAS[0].edge)
    sheet.label(pair_left(0, 0) + PAIR / 2, 1131, "StepResult")
    sheet.box(pair_left(0, 0), 1152, PAIR, 28, REPLICAS[0])
    sheet.text(pair_left(0, 0) + PAIR / 2, 1170, "step_record", size=12, face="code")
    sheet.arrow([(right, 1166), (pair_left(0, 1), 1166)], colour=REPLICAS[0].edge)
    sheet.label((right + pair_left(0, 1)) / 2 - 3, 1166, "Record")
    sheet.text(
        pair_left(0, 1) + 8, 1170, "metrics.jsonl, the terminal, wandb", size=12, anchor="start"
    )
