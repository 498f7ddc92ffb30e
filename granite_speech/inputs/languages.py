"""Languages by their codes and English names."""

import re
from typing import Any

from granite_speech.errors import InputError

__all__ = ["language_name", "requested_languages"]

# ISO 639-1 codes, and the three of whisper that are not among them, with the names that IBM's prompts use: Mandarin for zh.
_TABLE = """
af Afrikaans, am Amharic, ar Arabic, as Assamese, az Azerbaijani, ba Bashkir, be Belarusian, bg Bulgarian, bn Bengali, bo Tibetan,
br Breton, bs Bosnian, ca Catalan, cs Czech, cy Welsh, da Danish, de German, el Greek, en English, es Spanish, et Estonian, eu Basque,
fa Persian, fi Finnish, fo Faroese, fr French, ga Irish, gl Galician, gu Gujarati, ha Hausa, haw Hawaiian, he Hebrew, hi Hindi, hr Croatian,
ht Haitian Creole, hu Hungarian, hy Armenian, id Indonesian, is Icelandic, it Italian, ja Japanese, jw Javanese, ka Georgian, kk Kazakh,
km Khmer, kn Kannada, ko Korean, la Latin, lb Luxembourgish, ln Lingala, lo Lao, lt Lithuanian, lv Latvian, mg Malagasy, mi Maori,
mk Macedonian, ml Malayalam, mn Mongolian, mr Marathi, ms Malay, mt Maltese, my Burmese, ne Nepali, nl Dutch, nn Nynorsk, no Norwegian,
oc Occitan, pa Punjabi, pl Polish, ps Pashto, pt Portuguese, ro Romanian, ru Russian, sa Sanskrit, sd Sindhi, si Sinhala, sk Slovak,
sl Slovenian, sn Shona, so Somali, sq Albanian, sr Serbian, su Sundanese, sv Swedish, sw Swahili, ta Tamil, te Telugu, tg Tajik, th Thai,
tk Turkmen, tl Tagalog, tr Turkish, tt Tatar, uk Ukrainian, ur Urdu, uz Uzbek, vi Vietnamese, yi Yiddish, yo Yoruba, yue Cantonese,
zh Mandarin, zu Zulu
"""
_NAMES = dict(entry.split(maxsplit=1) for entry in _TABLE.split(","))
# Other codes (ISO 639-1 where whisper differs; ISO 639-2 of the releases' languages) and other names of the same languages.
_ALIASES = {
    **{"jv": "Javanese", "nb": "Norwegian", "fil": "Tagalog", "cmn": "Mandarin", "eng": "English", "fra": "French", "fre": "French"},
    **{"deu": "German", "ger": "German", "spa": "Spanish", "por": "Portuguese", "jpn": "Japanese", "ita": "Italian", "zho": "Mandarin"},
    **{"chi": "Mandarin", "chinese": "Mandarin", "mandarin chinese": "Mandarin", "castilian": "Spanish"},
}
_KNOWN = _ALIASES | _NAMES | {name.casefold(): name for name in _NAMES.values()}
# A code with or without a region or script: de, de-DE, zh_Hans, es-419.
_CODE = re.compile(r"([a-z]{2,3})(?:[-_](?:[a-z]{2}|[a-z]{4}|[0-9]{3}))*")
_LONGEST_NAME = 40


def language_name(language: Any, option: str) -> str:
    """The English name of a language.

    Args:
        language: an ISO 639-1 code ("de", also with a region, "de-DE") or an English name, in any case. A name that is not known here is
            taken as it is, because a model may have been trained on it.
        option: what the caller calls it, for errors.

    Raises:
        InputError: an unknown code, or not a name.
    """
    text = " ".join(language.split()) if isinstance(language, str) else ""
    key = text.casefold()
    code = _CODE.fullmatch(key)
    known = _KNOWN.get(key) or (_KNOWN.get(code[1]) if code else None)
    if known:
        return known
    if code:
        raise InputError(
            got=f"{option}={language!r:.40}",
            expected=f"the English name of a language, or one of the codes {', '.join(sorted(_NAMES))}",
            remedy="Pass the name for any other language",
        )
    if key == "auto" or not 0 < len(text) <= _LONGEST_NAME or not text.replace(" ", "").replace("-", "").replace("'", "").isalpha():
        raise InputError(got=f"{option}={language!r:.40}", expected="the code or English name of a language", remedy=f"Correct {option}")
    return text.title() if text == key else text


def requested_languages(task: str, language: Any, target_language: Any) -> tuple[str | None, str | None]:
    """The English names of the language of the speech and of the translation; None: not known, or no translation.

    Raises:
        InputError: an unknown code, a target without translation, or a target that is the language of the speech.
    """
    is_known = language is not None and not (isinstance(language, str) and language.strip().casefold() == "auto")
    spoken = language_name(language, "language") if is_known else None
    if task == "transcribe":
        if target_language is not None:
            raise InputError(
                got=f"target_language={target_language!r:.40} for task='transcribe'",
                expected="a target only for a translation",
                remedy="Pass task='translate', or language if this is what is spoken",
            )
        return spoken, None
    target = "English" if target_language is None else language_name(target_language, "target_language")
    if spoken == target:
        raise InputError(
            got=f"a translation from {spoken} to {target}",
            expected="another target_language" + (", which is English if omitted" if target_language is None else ""),
            remedy="Pass one, or task='transcribe'",
        )
    return spoken, target
