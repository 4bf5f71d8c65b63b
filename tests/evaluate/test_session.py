import pytest
import torch
from transformers import DynamicCache

from kvcompress.evaluate.session import Dialogue, Session, continuation_logits, converse

ROWS = [[0, 40, 41, 42, 43], [0, 50], [0, 60, 61]]


def session(model):
    return Session(model, DynamicCache(config=model.config), pad_id=2)


def alone(model, row):
    """Logits of one row without cache and padding."""
    with torch.inference_mode():
        return model(torch.tensor([row])).logits[0]


def test_a_padded_row_gives_the_logits_of_the_row_alone(tiny_llama):
    logits = session(tiny_llama).prefill(ROWS)
    for row, found in zip(ROWS, logits, strict=True):
        torch.testing.assert_close(found, alone(tiny_llama, row)[-1], atol=1e-5, rtol=1e-4)


def test_feeding_and_selecting_go_on_where_the_row_was(tiny_llama):
    running = session(tiny_llama)
    running.prefill(ROWS)
    running.select([2, 0, 2])
    fed = torch.tensor([[7, 8], [9, 10], [11, 12]])
    logits = running.feed(fed)
    for place, row in enumerate((2, 0, 2)):
        expected = alone(tiny_llama, ROWS[row] + fed[place].tolist())[-2:]
        torch.testing.assert_close(logits[place], expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("feed_tokens", (1, 4, 16))
def test_a_continuation_in_pieces_is_the_whole_one(tiny_llama, feed_tokens):
    prefix, rest = [0, 30, 31, 32], [33, 34, 35, 36, 37, 38, 39]
    running = session(tiny_llama)
    logits = running.prefill([prefix])
    found = continuation_logits(running, logits, torch.tensor([rest]), feed_tokens)
    expected = alone(tiny_llama, prefix + rest)[len(prefix) - 1 : -1]
    torch.testing.assert_close(found[0], expected, atol=1e-5, rtol=1e-4)


def test_answers_are_the_model_s_own_greedy_tokens(tiny_llama):
    running = session(tiny_llama)
    logits = running.prefill(ROWS)
    dialogues = [Dialogue([([], 6)]), Dialogue([([70, 71], 4)]), Dialogue([([], 2), ([72], 3)])]
    converse(running, logits, dialogues, lambda token: False)
    for row, dialogue in zip(ROWS, dialogues, strict=True):
        text = list(row)
        for (forced, limit), answer in zip(dialogue.turns, dialogue.answers, strict=True):
            text += forced
            for token in answer:
                assert token == alone(tiny_llama, text)[-1].argmax()
                text.append(token)
            assert len(answer) == limit


def test_an_answer_stops_at_its_end_and_the_next_question_follows():
    dialogue = Dialogue([([], 5), ([7], 5)])

    def ends(token):
        return token == 9

    fed = [dialogue.next_token(likeliest, ends, 0) for likeliest in (4, 9, 1, 5, 9, 3)]
    assert fed == [4, 9, 7, 5, 9, 0]  # 7 is forced, 0 fills once all is answered
    assert dialogue.done
    assert dialogue.answers[:2] == [[4, 9], [5, 9]]
