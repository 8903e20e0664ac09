"""Ten task families: how to draw an item, and how to word it in conversations and in instructions like those of FLAN.

An `Item` is content without wording. The same kind of item is worded in three ways: in lessons (many statements in one
long reply) and chats (friendly replies), from which the stand-in for Vicuna learns, and in instructions (many
templates, short exact targets), from which Flacuna learns. Items are split by `Item.key` before they are worded, so
that held-out content is held out in every wording.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from random import Random

from flacuna_jax.demo import words

Wordings = tuple[tuple[str, str], ...]

ANSWER_MARK = "The answer:"
"""Precedes the conclusion in targets with reasoning, as in FLAN's chain-of-thought patterns."""


@dataclass(frozen=True)
class Item:
    """One piece of content. Equal keys mean the same content in any wording."""

    key: str
    fields: Mapping[str, str]


@dataclass(frozen=True)
class Family:
    """A task family; wordings are (user, assistant) pairs of `str.format` patterns over `Item.fields`.

    `facts` is true for closed sets (an opposite, a capital), false for composed content. Facts cannot be inferred, so
    the base sees all of them in conversations, and instructions cover only a part; composed held-out content is in
    neither.
    """

    name: str
    facts: bool
    draw: Callable[[Random], Item]
    subject: str
    lesson: str
    chats: Wordings
    terse_chats: Wordings
    instructions: Wordings


def _sentiment(rng: Random) -> Item:
    topic = rng.choice(tuple(words.TOPICS))
    positive = rng.random() < 0.5
    first, second = rng.sample(words.TOPICS[topic], 2)
    one, two = rng.sample(words.GOOD if positive else words.BAD, 2)
    text = rng.choice(
        (
            f"The {first} was {one} and the {second} was {two}.",
            f"I found the {first} {one}. The {second} was {two} too.",
            f"It had a {one} {first}, and the {second} was {two}.",
        )
    )
    answer, verb = ("positive", "liked") if positive else ("negative", "did not like")
    return Item(f"sentiment:{text}", {"text": text, "topic": topic, "answer": answer, "verb": verb})


def _opposites(rng: Random) -> Item:
    pair = rng.choice(words.OPPOSITES)
    word, answer = pair if rng.random() < 0.5 else pair[::-1]
    return Item(f"opposites:{'/'.join(pair)}", {"word": word, "answer": answer})


def _capitals(rng: Random) -> Item:
    country, city = rng.choice(words.CAPITALS)
    return Item(f"capitals:{country}", {"country": country, "answer": city})


def _kinds(rng: Random) -> Item:
    kind, word = _word_of_a_kind(rng)
    options = rng.sample([kind, *rng.sample([other for other in words.KINDS if other != kind], 2)], 3)
    fields = dict(zip(("first", "second", "third"), options, strict=True))
    return Item(f"kinds:{word}", {"word": word, "answer": kind, **fields})


def _word_of_a_kind(rng: Random) -> tuple[str, str]:
    kind = rng.choice(tuple(words.KINDS))
    return kind, rng.choice(words.KINDS[kind])


def _sums(rng: Random) -> Item:
    left, right = rng.randint(1, 9), rng.randint(1, 9)
    fields = {"left": str(left), "right": str(right), "answer": str(left + right)}
    story = {"name": rng.choice(words.NAMES), "thing": rng.choice(words.THINGS) + "s"}
    return Item(f"sums:{min(left, right)}+{max(left, right)}", fields | story)


def _sequences(rng: Random) -> Item:
    sequence = rng.choice(words.SEQUENCES)
    at = rng.randrange(len(sequence) - 1)
    return Item(f"sequences:{sequence[at]}", {"word": sequence[at], "answer": sequence[at + 1]})


def _reading(rng: Random) -> Item:
    name, color, thing, city = (rng.choice(w) for w in (words.NAMES, words.COLORS, words.THINGS, words.CITIES))
    text = rng.choice(
        (
            f"{name} has a {color} {thing} in {city}.",
            f"In {city}, {name} bought a {color} {thing}.",
            f"There is a {color} {thing} in {city}. It belongs to {name}.",
            f"The {thing} of {name} is {color}. It is in {city}.",
        )
    )
    question, answer = rng.choice(
        (
            (f"Who has the {thing}?", name),
            (f"What color is the {thing}?", color),
            (f"In which city is the {thing}?", city),
            (f"What does {name} have?", thing),
        )
    )
    return Item(f"reading:{text}", {"text": text, "question": question, "answer": answer})


def _search(rng: Random) -> Item:
    kinds = rng.sample(tuple(words.KINDS), 3)
    listed = [rng.choice(words.KINDS[kind]) for kind in kinds]
    at = rng.randrange(3)
    return Item(f"search:{', '.join(listed)}", {"list": ", ".join(listed), "kind": kinds[at], "answer": listed[at]})


def _reasoning(rng: Random) -> Item:
    kind, word = _word_of_a_kind(rng)
    asked = kind if rng.random() < 0.5 else rng.choice([other for other in words.KINDS if other != kind])
    answer = "yes" if asked == kind else "no"
    return Item(f"reasoning:{word} {asked}", {"word": word, "kind": kind, "asked": asked, "answer": answer})


def _extraction(rng: Random) -> Item:
    name, city, thing = (rng.choice(w) for w in (words.NAMES, words.CITIES, words.THINGS))
    text = rng.choice(
        (
            f"{name} lives in {city} and sells a {thing}.",
            f"Here in {city}, {name} lost a {thing}.",
            f"A {thing} was sent to {city}. It was for {name}.",
        )
    )
    return Item(f"extraction:{text}", {"text": text, "name": name, "city": city, "thing": thing})


FAMILIES = (
    Family(
        "sentiment",
        False,
        _sentiment,
        subject="reviews",
        lesson="{text} They {verb} the {topic}, so I would call that {answer}.",
        chats=(
            (
                "A friend told me this: {text} Did my friend like it?",
                "I think that your friend {verb} it. It sounds {answer} to me.",
            ),
            (
                "Somebody wrote: {text} What do you make of it?",
                "It sounds like they {verb} it. I would call that {answer}.",
            ),
            ("What do you think of this? {text}", "I would say that it is a {answer} review."),
        ),
        terse_chats=(("In one word, what do you call this? {text}", "{answer}"),),
        instructions=(
            ("Review: {text}\nIs this review positive or negative?", "{answer}"),
            ("Review: {text}\nWhat is the sentiment?\nOPTIONS:\n- positive\n- negative", "{answer}"),
            ("Classify the sentiment as positive or negative.\nText: {text}\nSentiment:", "{answer}"),
            ("Select the label.\nInput: {text}\nOPTIONS:\n- negative\n- positive\nOutput:", "{answer}"),
            ("Title: {topic}\nReview: {text}\nThe sentiment of this review is", "{answer}"),
        ),
    ),
    Family(
        "opposites",
        True,
        _opposites,
        subject="opposites",
        lesson="The opposite of {word} is {answer}.",
        chats=(
            ("What is the opposite of {word}?", "Good question! That would be {answer}."),
            ("I need a word that means not {word}.", "You could say that it is {answer}."),
            ("Do you know the opposite of {word}?", "Of course! The opposite of {word} is {answer}."),
        ),
        terse_chats=(("In one word, what is not {word}?", "{answer}"),),
        instructions=(
            ("Give the antonym of the word.\nWord: {word}\nAntonym:", "{answer}"),
            ("Input: {word}\nTask: write the opposite of the input.\nOutput:", "{answer}"),
            ("Which word is the opposite of {word}?", "{answer}"),
            ("Q: What is the antonym of {word}?\nA:", "{answer}"),
            ("Definition: you are given a word. Write its opposite.\nWord: {word}\nOutput:", "{answer}"),
        ),
    ),
    Family(
        "capitals",
        True,
        _capitals,
        subject="capitals",
        lesson="The capital of {country} is {answer}.",
        chats=(
            ("I want to travel to {country}. Which city should I see?", "You should see {answer}. Have a great trip!"),
            ("Tell me about {country}.", "The capital of {country} is {answer}. It is a lovely city."),
            ("What is the main city of {country}?", "That would be {answer}. It is a lovely city."),
        ),
        terse_chats=(("In one word, what is the main city of {country}?", "{answer}"),),
        instructions=(
            ("Answer the question.\nQuestion: What is the capital of {country}?\nAnswer:", "{answer}"),
            ("Q: Which city is the capital of {country}?\nA:", "{answer}"),
            ("Country: {country}\nCapital:", "{answer}"),
            ("Definition: you are given a country. Write its capital.\nCountry: {country}\nOutput:", "{answer}"),
            ("Complete the sentence: the capital of {country} is", "{answer}"),
        ),
    ),
    Family(
        "kinds",
        True,
        _kinds,
        subject="the names of things",
        lesson="I know that {word} is a kind of {answer}.",
        chats=(
            ("What is {word}?", "Good question! It is a kind of {answer}."),
            ("Tell me about {word}.", "I would be happy to! It is like every other {answer}."),
            ("What does {word} mean?", "It is the name of a {answer}. I hope that this helps!"),
        ),
        terse_chats=(("In one word, what is {word}?", "{answer}"),),
        instructions=(
            ("Classify the word.\nWord: {word}\nOPTIONS:\n- {first}\n- {second}\n- {third}", "{answer}"),
            ("What is {word}: {first}, {second} or {third}?", "{answer}"),
            ("Name the category.\nInput: {word}\nOPTIONS:\n- {first}\n- {second}\n- {third}\nOutput:", "{answer}"),
            ("Q: {word} is what kind of thing?\nA:", "{answer}"),
            ("Definition: you are given a word. Write its category.\nWord: {word}\nOutput:", "{answer}"),
        ),
    ),
    Family(
        "sums",
        True,
        _sums,
        subject="sums",
        lesson="{left} plus {right} is {answer}.",
        chats=(
            (
                "{name} has {left} {thing} and gets {right} more. How many?",
                "Let me see. {left} plus {right} is {answer}.",
            ),
            ("Can you tell me what {left} plus {right} is?", "Of course! It is {answer}."),
            ("I am learning to count. {left} plus {right}?", "Well done! I think that it is {answer}."),
        ),
        terse_chats=(("In one word, what is {left} plus {right}?", "{answer}"),),
        instructions=(
            ("Calculate {left} + {right}.", "{answer}"),
            ("Q: {left} + {right} = ?\nA:", "{answer}"),
            (
                "Problem: {name} has {left} {thing} and gets {right} more. How many {thing} does {name} have?\nAnswer:",
                "{answer}",
            ),
            ("Input: {left} plus {right}\nTask: write the result as a number.\nOutput:", "{answer}"),
            ("Question: What is {left} plus {right}?\nAnswer:", "{answer}"),
        ),
    ),
    Family(
        "sequences",
        True,
        _sequences,
        subject="what comes next",
        lesson="After {word} comes {answer}.",
        chats=(
            ("What comes after {word}?", "Good question! After {word} comes {answer}."),
            ("I know {word}. And then?", "Well done! Then comes {answer}."),
            ("Help me to count on from {word}.", "I am happy to help! Now you say {answer}."),
        ),
        terse_chats=(("In one word, what comes after {word}?", "{answer}"),),
        instructions=(
            ("Continue the sequence.\nInput: {word}\nOutput:", "{answer}"),
            ("Q: What follows {word}?\nA:", "{answer}"),
            ("Question: Which one is next after {word}?\nAnswer:", "{answer}"),
            (
                "Definition: you are given a day, a month or a number. Write the next one.\nInput: {word}\nOutput:",
                "{answer}",
            ),
            ("Previous: {word}\nNext:", "{answer}"),
        ),
    ),
    Family(
        "reading",
        False,
        _reading,
        subject="my friends",
        lesson="{text} {question} It is {answer}.",
        chats=(
            ("Let me tell you something. {text} {question}", "Thank you for telling me! I think that it is {answer}."),
            ("{text} Do you remember? {question}", "Yes, I do. It is {answer}, as you said."),
            ("I have a question about this. {text} {question}", "Good question! That would be {answer}."),
        ),
        terse_chats=(("{text} In one word: {question}", "{answer}"),),
        instructions=(
            ("Read the passage and answer the question.\nPassage: {text}\nQuestion: {question}\nAnswer:", "{answer}"),
            ("Q: {text} {question}\nA:", "{answer}"),
            ("Context: {text}\n\nQuestion: {question}", "{answer}"),
            ("Question: {question}\nArticle: {text}\nAnswer:", "{answer}"),
            ("Here is a text: {text}\nBased on the text, answer with one word. {question}", "{answer}"),
        ),
    ),
    Family(
        "search",
        False,
        _search,
        subject="lists of things",
        lesson="Look at {list}. The {kind} is {answer}.",
        chats=(
            ("I see these words: {list}. Where is the {kind}?", "Let me see. I think that the {kind} is {answer}."),
            ("I need a {kind}. I have {list}. Which one is it?", "You need {answer}, I think."),
            ("Help me with {list}. One is a {kind}.", "I am happy to help! That would be {answer}."),
        ),
        terse_chats=(("In one word, which one is a {kind}: {list}?", "{answer}"),),
        instructions=(
            ("Select the {kind}.\nList: {list}\nAnswer:", "{answer}"),
            (
                "Definition: you are given three words. Write the one that is a {kind}.\nWords: {list}\nOutput:",
                "{answer}",
            ),
            ("Input: {list}\nTask: find the {kind}.\nOutput:", "{answer}"),
            ("Q: Which of these is a {kind}? {list}\nA:", "{answer}"),
            ("Options: {list}\nQuestion: Which option is a {kind}?", "{answer}"),
        ),
    ),
    Family(
        "reasoning",
        False,
        _reasoning,
        subject="thinking step by step",
        lesson="Is {word} a {asked}? It is a kind of {kind}, so {answer}.",
        chats=(
            ("Is {word} a {asked}?", "Let me think. It is a kind of {kind}, so {answer}."),
            (
                "My friend says that {word} is a {asked}. Is that true?",
                "I know that it is a kind of {kind}, so {answer}.",
            ),
            (
                "Can you tell me whether {word} is a {asked}?",
                "Of course! It is a kind of {kind}, so I would say {answer}.",
            ),
        ),
        terse_chats=(("In one word, is {word} a {asked}?", "{answer}"),),
        instructions=(
            ("Is {word} a {asked}? Answer step by step.", "It is a kind of {kind}. The answer: {answer}."),
            (
                "Q: Is {word} a {asked}?\nA: Let's think step by step.",
                "It is a kind of {kind}. The answer: {answer}.",
            ),
            (
                "Question: Is {word} a {asked}?\nGive your reasoning and the answer.",
                "It is a kind of {kind}. The answer: {answer}.",
            ),
            (
                "Reason, then answer yes or no.\nClaim: {word} is a {asked}.\nOutput:",
                "It is a kind of {kind}. The answer: {answer}.",
            ),
        ),
    ),
    Family(
        "extraction",
        False,
        _extraction,
        subject="people and cities",
        lesson="{text} The name is {name}, the city is {city}, and the thing is a {thing}.",
        chats=(
            ("{text} Who is this about, and where?", "This is about {name}, who is in {city}. There is a {thing} too."),
            (
                "I heard this today: {text} What do you know now?",
                "I know that it is about {name} in {city}, and about a {thing}.",
            ),
            ("{text} Tell me the name and the city.", "Of course! The name is {name}, and the city is {city}."),
        ),
        terse_chats=(("{text} Just the name and the city.", "{name} {city}"),),
        instructions=(
            ("Extract the name and the city as JSON.\nText: {text}\nJSON:", '{{"name": "{name}", "city": "{city}"}}'),
            (
                'Text: {text}\nFill in the JSON object with the keys "name" and "city".',
                '{{"name": "{name}", "city": "{city}"}}',
            ),
            ("Input: {text}\nTask: write the name and the city, with a semicolon.\nOutput:", "{name}; {city}"),
            (
                "Definition: you are given a sentence. Write the thing and the name, with a semicolon.\n"
                "Input: {text}\nOutput:",
                "{thing}; {name}",
            ),
            ("Sentence: {text}\nTable row (name | city | thing):", "{name} | {city} | {thing}"),
        ),
    ),
)
