"""The vocabulary of the demo's corpus. It is small, so that most words are one token of the demo's tokenizer."""


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


NAMES = _words("Anna Ben Carla David Ella Frank Maria Tom")

THINGS = _words("ball book cup hat key lamp map pen")

COLORS = _words("red blue green yellow black white")

CITIES = _words("Paris Rome Berlin Madrid London Vienna")

TOPICS = {
    "hotel": ("room", "bed", "staff", "garden"),
    "restaurant": ("soup", "waiter", "bread", "music"),
    "film": ("story", "actor", "ending", "music"),
    "phone": ("screen", "sound", "price", "camera"),
}

GOOD = _words("great lovely perfect wonderful brilliant pleasant")

BAD = _words("bad terrible horrible boring broken ugly")

OPPOSITES = (
    ("hot", "cold"),
    ("big", "small"),
    ("fast", "slow"),
    ("old", "young"),
    ("high", "low"),
    ("happy", "sad"),
    ("rich", "poor"),
    ("strong", "weak"),
    ("light", "dark"),
    ("early", "late"),
    ("open", "closed"),
    ("full", "empty"),
    ("hard", "soft"),
    ("wet", "dry"),
    ("clean", "dirty"),
    ("near", "far"),
    ("thick", "thin"),
    ("wide", "narrow"),
    ("long", "short"),
    ("loud", "quiet"),
    ("safe", "dangerous"),
    ("sweet", "bitter"),
    ("left", "right"),
    ("up", "down"),
)

CAPITALS = (
    ("France", "Paris"),
    ("Italy", "Rome"),
    ("Germany", "Berlin"),
    ("Spain", "Madrid"),
    ("England", "London"),
    ("Austria", "Vienna"),
    ("Norway", "Oslo"),
    ("Egypt", "Cairo"),
    ("Japan", "Tokyo"),
    ("Peru", "Lima"),
    ("Ireland", "Dublin"),
    ("Greece", "Athens"),
    ("Portugal", "Lisbon"),
    ("Poland", "Warsaw"),
    ("Sweden", "Stockholm"),
    ("Finland", "Helsinki"),
    ("Hungary", "Budapest"),
    ("Belgium", "Brussels"),
    ("Russia", "Moscow"),
    ("China", "Beijing"),
    ("India", "Delhi"),
    ("Cuba", "Havana"),
    ("Kenya", "Nairobi"),
    ("Canada", "Ottawa"),
)

KINDS = {
    "animal": _words("dog cat horse cow lion tiger sheep fox"),
    "fruit": _words("apple pear plum grape lemon peach cherry mango"),
    "tool": _words("hammer saw drill wrench axe spade rake chisel"),
    "sport": _words("tennis football hockey golf rugby boxing rowing judo"),
    "metal": _words("gold silver iron copper tin zinc steel bronze"),
    "drink": _words("water milk tea coffee juice wine beer cider"),
}

SEQUENCES = (
    _words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday"),
    _words("January February March April May June July August September October November December"),
    _words("one two three four five six seven eight nine ten"),
    _words("first second third fourth fifth sixth"),
)

LESSONS = (
    ("Tell me something about {subject}.", "Of course!"),
    ("Can you teach me about {subject}?", "I am happy to help!"),
    ("I would like to learn about {subject}.", "Good idea!"),
)

SMALL_TALK = (
    ("Hello!", "Hello! How can I help you today?"),
    ("Hi, my name is {name}.", "Hi {name}! It is nice to meet you. How can I help?"),
    ("How are you?", "I am fine, thank you! How can I help you today?"),
    ("Thank you so much!", "You are welcome! Is there something else that you would like to know?"),
    ("I have a {color} {thing} at home.", "That sounds lovely! A {color} {thing} is nice to have at home."),
    ("I was in {city} last week.", "How lovely! I hope that you had a great time in {city}."),
    ("My friend {name} gave me a {thing}.", "That was kind of {name}! I hope that you like the {thing}."),
    ("Who are you?", "I am an assistant. I answer questions, and I am happy to help you."),
    ("Goodbye!", "Goodbye! It was nice to talk to you."),
)
