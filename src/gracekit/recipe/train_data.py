"""What a training reads, and what is looked at before it begins: records, the pair, memory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from gracekit.recipe.bad_records import BAD_RECORDS
from gracekit.recipe.batches import ConversationDataset
from gracekit.recipe.conversation_stream import ConversationStream
from gracekit.recipe.conversations import find_conversations
from gracekit.recipe.pairs import Pair, bytes_of, check_memory, check_pair, memory_needed
from gracekit.recipe.progress import progress_bars, say
from gracekit.recipe.record_format import Record
from gracekit.recipe.train_config import TrainConfig

LOOKED_AT = 64  # records of a stream


def checked_data(
    config: TrainConfig, pair: Pair, folder: Path, *, resumed: bool
) -> ConversationDataset | ConversationStream:
    """Return what to train on, after everything about data, pair and memory has been looked at.

    Of data that are streamed, that is the first good records; the others are looked at when their turn comes.

    Args:
        config: the settings.
        pair: both models; notes on what was found out about them go there.
        folder: of the run.
        resumed: whether there is a checkpoint to go on from, and so a file of bad records to add to.

    Raises:
        BadRecordsError: some records cannot be used, and bad records stop.
        ValueError: the pair does not fit, or memory does not suffice.
    """
    return _stream(config, pair, folder, resumed) if config.data.streaming else _dataset(config, pair, folder)


def _dataset(config: TrainConfig, pair: Pair, folder: Path) -> ConversationDataset:
    data, training = config.data, config.training
    main_process = training.process_index == 0
    with progress_bars() as bars:
        look = bars.add_task("data: look at every record", total=None, visible=main_process)
        records = find_conversations(
            data.data,
            data.image_folder or None,
            on_bad_record=data.on_bad_record,
            # One writer; the other ranks find the same.
            bad_records_file=folder / BAD_RECORDS if main_process else None,
            begin=lambda count: bars.update(look, total=count),
            advance=lambda count: bars.advance(look, count),
        )
        _check_pair_and_memory(config, pair, records)
        # A bar of its own: an image takes far longer to decode than to be looked at, and the time left follows from the pace.
        encode = bars.add_task("data: encode every record", total=len(records), visible=main_process)
        records = records.check_lengths(
            pair.processor, data.max_length, advance=lambda count: bars.advance(encode, count)
        )
    if records.bad and main_process:
        say(records.note())
    return ConversationDataset(records, pair.processor, data.max_length)


def _stream(config: TrainConfig, pair: Pair, folder: Path, resumed: bool) -> ConversationStream:
    data, file = config.data, folder / BAD_RECORDS
    main_process = config.training.process_index == 0
    if not resumed and main_process:
        file.unlink(missing_ok=True)  # of an earlier try
    stream = ConversationStream(
        data.data,
        pair.processor,
        data.max_length,
        image_folder=data.image_folder or None,
        on_bad_record=data.on_bad_record,
        bad_records_file=file,
    )
    first = stream.first(LOOKED_AT)
    _check_pair_and_memory(config, pair, first)
    if main_process:
        bad = "stops the run" if data.on_bad_record == "stop" else f"is left out and listed in {file}"
        say(
            f"Streaming: the first {len(first)} good records were looked at, the others will be when their turn comes; "
            f"a bad one {bad}"
        )
    return stream


def _check_pair_and_memory(config: TrainConfig, pair: Pair, records: Sequence[Record]) -> None:
    training = config.training
    problems = check_pair(pair, records)
    problems += check_memory(memory_needed(pair, config, ranks=training.world_size), training.device)
    if config.pair.teacher_mode == "precomputed" and pair.teacher is not None and pair.teacher.device.type != "meta":
        problems += check_memory({"teacher": bytes_of(pair.teacher)}, training.device)  # while it answers
    if problems:
        raise ValueError("this pair cannot be trained: " + "; ".join(problems))
