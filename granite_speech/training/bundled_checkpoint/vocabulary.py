"""Contents of the synthetic training data: a small vocabulary, sentences, text tasks, and respellings in other languages.

The words are digits, numbers and commands. `respell` writes them so that a voice for another language pronounces them with its accent.
All randomness comes from the `numpy.random.Generator` passed in.
"""

from collections.abc import Iterable

import numpy as np

__all__ = ["VOCABULARY", "make_sentence", "make_text_task"]

# ARPAbet pronunciations, with AX for the unstressed vowel. Respellings in other languages are built from them.
DIGITS = {
    "zero": "Z IH R OW", "one": "W AH N", "two": "T UW", "three": "TH R IY", "four": "F AO R", "five": "F AY V", "six": "S IH K S",
    "seven": "S EH V AX N", "eight": "EY T", "nine": "N AY N",
}  # fmt: skip
NUMBERS = {
    "ten": "T EH N", "eleven": "IH L EH V AX N", "twelve": "T W EH L V", "thirteen": "TH ER T IY N", "fourteen": "F AO R T IY N",
    "fifteen": "F IH F T IY N", "sixteen": "S IH K S T IY N", "seventeen": "S EH V AX N T IY N", "eighteen": "EY T IY N",
    "nineteen": "N AY N T IY N", "twenty": "T W EH N T IY", "thirty": "TH ER T IY", "forty": "F AO R T IY", "fifty": "F IH F T IY",
    "sixty": "S IH K S T IY", "seventy": "S EH V AX N T IY", "eighty": "EY T IY", "ninety": "N AY N T IY",
    "hundred": "HH AH N D R EH D", "thousand": "TH AW Z AX N D",
}  # fmt: skip
# The first are those of Google's Speech Commands (arXiv 1804.03209), for which recordings of people exist, but without "tree", which a
# small model confuses with "three".
COMMANDS = {
    "yes": "Y EH S", "no": "N OW", "up": "AH P", "down": "D AW N", "left": "L EH F T", "right": "R AY T", "on": "AA N", "off": "AO F",
    "stop": "S T AA P", "go": "G OW", "backward": "B AE K W ER D", "forward": "F AO R W ER D", "follow": "F AA L OW", "learn": "L ER N",
    "visual": "V IH ZH UW AX L", "bed": "B EH D", "bird": "B ER D", "cat": "K AE T", "dog": "D AO G", "happy": "HH AE P IY",
    "house": "HH AW S", "wow": "W AW", "start": "S T AA R T", "open": "OW P AX N", "close": "K L OW Z", "play": "P L EY",
    "pause": "P AO Z", "next": "N EH K S T", "back": "B AE K", "save": "S EY V", "print": "P R IH N T", "copy": "K AA P IY",
    "help": "HH EH L P", "menu": "M EH N Y UW", "cancel": "K AE N S AX L", "repeat": "R IH P IY T", "louder": "L AW D ER",
    "quiet": "K W AY AX T", "record": "R IH K AO R D", "answer": "AE N S ER",
}  # fmt: skip
PRONUNCIATION = DIGITS | NUMBERS | COMMANDS
VOCABULARY = tuple(PRONUNCIATION)
FIGURES = dict(zip("0123456789", DIGITS, strict=True))

# How each language writes English sounds. A sound that a language lacks has the spelling of the one its speakers use instead. Sounds not
# listed are written as their ARPAbet letters in lower case.
_COMMON = "AA a,AE e,AH a,AX e,AO o,AW au,AY ai,EH e,ER er,EY ei,IH i,IY i,OW ou,UW u,CH c,HH h,NG ng,TH t,DH d,ZH j"
_RESPELLING = {
    "ca": "TH s,Z s,ZH j,W u,Y i,HH ,K c",
    "cs": "IY í,UW ú,EY ej,AY aj,W v,ZH ž,Y j,TH s",
    "de": "AE ä,AO oh,AY ei,ER ör,EY eh,IY ie,OW oh,UW uh,W w,V w,F f,Z s,ZH sch,Y j",
    "el": "AA α,AE α,AH α,AX ε,AO ο,AW αου,AY αϊ,EH ε,ER ερ,EY εϊ,IH ι,IY ι,OW οου,UW ου,B μπ,D ντ,F φ,G γκ,HH χ,K κ,L λ,M μ,N ν,P π,R ρ,"
    "S σ,T τ,TH θ,V β,W ου,Y γι,Z ζ,ZH ζ",
    "es": "Z s,ZH y,W u,Y y,HH j",
    "fi": "IY ii,UW uu,AO oo,W v,Z s,ZH s,Y j,AE ä,ER öör",
    "fr": "AH a,AW ahou,AY aill,EH è,AE â,ER eur,EY eï,OW ô,UW ou,W ou,Y y,S ss,TH s,N nn,M mm",
    "hi": "AA आा,AE ऐै,AH अ,AX अ,AO ओो,EH एे,EY एे,IH इि,IY ईी,OW ओो,UW ऊू,B ब,D ड,F फ,G ग,HH ह,K क,L ल,M म,N न,P प,R र,S स,T ट,"
    "TH थ,V व,W व,Y य,Z ज,ZH ज",
    "it": "W u,Y i,HH ,Z s,ZH gi",
    "nl": "AE e,AH u,AO oo,AY aai,ER eur,EY ee,IY ie,OW oo,UW oe,ZH zj,Y j",
    "pl": "AW ał,AY aj,EY ej,OW oł,W ł,V w,ZH ż,Y j,TH s",
    "ru": "AA а,AE э,AH а,AX э,AO о,AW ау,AY ай,EH э,ER эр,EY эй,IH и,IY и,OW оу,UW у,B б,D д,F ф,G г,HH х,K к,L л,M м,N н,P п,R р,S с,"
    "T т,TH с,V в,W у,Y й,Z з,ZH ж",
}  # fmt: skip
RESPELLING = {
    language: {sound: letters for sound, _, letters in (entry.partition(" ") for entry in f"{_COMMON},{text}".split(","))}
    for language, text in _RESPELLING.items()
}

BLANK = "-"  # the CTC blank in a stutter


def make_sentence(rng: np.random.Generator) -> str:
    """1 to 8 lower-case words of `VOCABULARY`: single words (nearly half), digit strings, numbers, commands or a mixture."""

    def some(words: Iterable[str], count: int) -> list[str]:
        return rng.choice(list(words), count).tolist()

    kind = rng.random()
    if kind < 0.45:
        words = some((DIGITS, NUMBERS, COMMANDS)[rng.choice(3, p=(0.42, 0.18, 0.4))], 1)
    elif kind < 0.65:
        words = some(DIGITS, rng.integers(2, 9))
    elif kind < 0.77:
        words = _number(rng)
    elif kind < 0.9:
        words = some(COMMANDS, rng.integers(2, 5))
    else:
        words = some(VOCABULARY, rng.integers(2, 9))
    return " ".join(words)


def _number(rng: np.random.Generator) -> list[str]:
    """One or two numbers below ten thousand, as they are read aloud."""
    numbers = list(NUMBERS)

    def below_hundred() -> list[str]:
        if rng.random() < 0.3:
            return [numbers[rng.integers(10)]]
        return [numbers[10 + rng.integers(8)], *([FIGURES[str(rng.integers(1, 10))]] if rng.random() < 0.7 else [])]

    words = []
    for _ in range(rng.integers(1, 3)):
        for large in ("thousand", "hundred"):
            if rng.random() < 0.35:
                words += [FIGURES[str(rng.integers(1, 10))], large]
        words += below_hundred()
    return words[:8]


def make_text_task(rng: np.random.Generator) -> tuple[str, str]:
    """(prompt, answer) of a task for the language model without audio.

    The tasks are digits to words, words to digits, repeating words and, most often, clearing up a stutter, which resembles its later job
    with audio. The stutter uses the longer of two sentences, because keeping its place in many words is the hard part.
    """
    figures = [str(one) for one in rng.integers(0, 10, rng.integers(1, 9))]
    words = [FIGURES[one] for one in figures]
    kind = rng.random()
    if kind < 0.2:
        return "write the digits as words: " + " ".join(figures), " ".join(words)
    if kind < 0.3:
        return "write the words as digits: " + " ".join(words), " ".join(figures)
    sentence = make_sentence(rng)
    if kind < 0.4:
        return "repeat the words: " + sentence, sentence
    sentence = max(sentence, make_sentence(rng), key=len)
    return "clear up the stutter: " + stutter(sentence, rng), sentence


def stutter(text: str, rng: np.random.Generator) -> str:
    """A text as CTC labels might spell it: repeated letters, `BLANK`s in between (always between equal letters), and a few errors."""
    pace = rng.uniform(0.2, 2.0)
    letters = [BLANK * rng.integers(0, 6)]
    for before, letter in zip(" " + text, text, strict=False):
        if letter != " " and rng.random() < 0.03:
            letter = str(rng.choice(["", *"aeiounrstdf"]))
        gap = rng.poisson(3 * pace if letter == " " else pace)
        repeated = letter * (1 if rng.random() < 0.8 else 2)
        letters.append((BLANK if letter == before else "") + repeated + BLANK * gap)
    return "".join(letters)


def respell(sentence: str, language: str) -> str:
    """Spell the sentence's sounds as the language would; "en" leaves it unchanged.

    Devanagari has two forms of each vowel: the first is used on its own, and the second after a consonant, where `अ` is not written. A
    consonant without a following vowel has a virama.
    """
    if language == "en":
        return sentence
    table = RESPELLING[language]
    return " ".join(_devanagari(table, word) if language == "hi" else _alphabetic(table, word, language) for word in sentence.split())


def _alphabetic(table: dict[str, str], word: str, language: str) -> str:
    letters = "".join(table.get(sound, sound.lower()) for sound in PRONUNCIATION[word].split())
    # A final consonant is silent in French unless an e follows.
    return letters + "e" if language == "fr" and letters[-1] not in "aeiouôèï" else letters


def _devanagari(table: dict[str, str], word: str) -> str:
    sounds = " ".join(PRONUNCIATION[word].split()).replace("ER", "AH R").replace("AW", "AA UW").replace("AY", "AA IY").split()
    written, after_consonant = "", False
    for sound in sounds:
        letters, vowel = table[sound], sound[0] in "AEIOU"
        if not vowel:
            written += ("्" if after_consonant else "") + letters
        elif not after_consonant:
            written += letters[0]
        else:
            written += letters[1:]
        after_consonant = not vowel
    return written + ("्" if after_consonant else "")
