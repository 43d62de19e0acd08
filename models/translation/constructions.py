"""Constructions of Classical Chinese in the synchronous grammar, each with its translation.

A template names, in braces, word classes of `models.translation.lexicon` or the phrases below.
``{who}`` and ``{who.2}`` are two different words of one class; a name that occurs twice on a side
is the same word. Both sides of a rule name the same children. Where a classical sentence has
several modern translations, the grammar always uses the same one, so that exact match is a
meaningful metric.
"""

from typing import NamedTuple


class Rule(NamedTuple):
    """A synchronous rule: one template per language, with the same children on both sides."""

    classical: str
    modern: str


_ACTIONS = (
    ("eat", "food"),
    ("drink", "liquid"),
    ("study", "book"),
    ("take", "goods"),
    ("handle", "animal"),
)


def _act(aspect: str) -> tuple[Rule, ...]:
    return tuple(
        Rule(f"{{{verb}}}{{{noun}}}", f"{{{verb}}}{aspect}{{{noun}}}") for verb, noun in _ACTIONS
    )


PHRASES = {"do": _act(""), "did": _act("了"), "have_done": _act("过")}
"""Verb phrases with a suitable object: plain (`do`), completed (`did`), experienced."""

_ONE_RULE = {
    # Predication and existence
    "nominal_predication": ("{name}者，{state}之{office}也。", "{name}是{state}的{office}。"),
    "nominal_negation": ("{name}非{state}人也。", "{name}不是{state}人。"),
    "existential_person": ("{state}人有{crave}{goods}者。", "{state}有个{crave}{goods}的人。"),
    "existential_place": ("{spot_in}有{number}{counted}。", "{spot_in}有{number}{counted}。"),
    "nonexistence": ("{spot_in}无{animal}。", "{spot_in}没有{animal}。"),
    "quantity_after_noun": ("{who}有{counted}{number}。", "{who}有{number}{counted}。"),
    # Voice and word order
    "passive_wei_suo": ("{who}为{who.2}所{deal}。", "{who}被{who.2}{deal}了。"),
    "passive_jian_yu": ("{who}见{deal}于{who.2}。", "{who}被{who.2}{deal}了。"),
    "topic_object": ("{goods}，{who}{take}之矣。", "{goods}，{who}已经把它{take}了。"),
    "fronted_pronoun": ("{book}，{who}未之{study}也。", "{book}，{who}还没有{study}过。"),
    "fronted_exclusive": ("{who}唯{goods}是{crave}。", "{who}一心只{crave}{goods}。"),
    "dative_yi": ("{who}以{goods}{give}{who.2}。", "{who}把{goods}{give}给{who.2}。"),
    "instrument_yi": ("{who}以{tool}{hit}{animal}。", "{who}用{tool}{hit}{animal}。"),
    "place_yu": ("{who}{did}于{spot_in}。", "{who}在{spot_in}{did}。"),
    # Questions and exclamations
    "question_he": ("{who}何{ask}？", "{who}{ask}什么？"),
    "question_an": ("{who}安{dwell}？", "{who}{dwell}哪里？"),
    "question_shu": ("孰{did}？", "谁{did}？"),
    "question_shu_compare": ("{who}与{who.2}孰{quality}？", "{who}和{who.2}哪一个更{quality}？"),
    "question_hu": ("{who}{did}乎？", "{who}{did}吗？"),
    "rhetorical_yan": ("{who}焉能{do}？", "{who}怎么能{do}呢？"),
    "rhetorical_qi": ("{who}岂{do}哉？", "{who}难道会{do}吗？"),
    "rhetorical_bu_yi": ("{do}，不亦{verdict}乎？", "{do}，不也很{verdict}吗？"),
    "exclamation_zai": ("{quality}哉，{who}也！", "{who}真{quality}啊！"),
    # Negation
    "negation_wei": ("{who}未{do}。", "{who}还没有{do}。"),
    "negation_fu": (
        "{who}{urge}{who.2}，{who.2}弗{heed}。",
        "{who}{urge}{who.2}，{who.2}不{heed}。",
    ),
    "prohibition_wu": ("{you}勿{do}。", "{you}不要{do}。"),
    "double_negation_mo": ("{state}人莫不{regard}{who}。", "{state}人没有谁不{regard}{who}。"),
    "double_negation_wei": ("{who}未尝不{do}。", "{who}没有一次不{do}。"),
    # Comparison and degree
    "comparison_yu": ("{who}{quality}于{who.2}。", "{who}比{who.2}更{quality}。"),
    "superlative_mo": ("莫{quality}于{who}。", "没有谁比{who}更{quality}。"),
    "preference": ("与其{do}，不若{do.2}。", "与其{do}，还不如{do.2}。"),
    "exclusive_wei": ("唯{who}能{do}。", "只有{who}能{do}。"),
    "all_jie": ("{state}人皆{do}。", "{state}人都{do}。"),
    # Modality and aspect
    "desire_yu": ("{who}欲{do}。", "{who}想要{do}。"),
    "inability": ("{who}不能{do}。", "{who}不能{do}。"),
    "possibility_ke": ("{goods}可{take}也。", "{goods}可以{take}。"),
    "duty_dang": ("{who}当{do}。", "{who}应当{do}。"),
    "past_chang": ("{who}尝{have_done}。", "{who}曾经{have_done}。"),
    "future_jiang": ("{leader}将{war}{state}。", "{leader}将要{war}{state}。"),
    "time_phrase": ("{time}，{who}{did}。", "{time}，{who}{did}。"),
    # Causation, opinion, speech
    "causative_shi": ("{leader}使{person}{do}。", "{leader}派{person}去{do}。"),
    "causative_ling": ("{who}令{who.2}{feel}。", "{who}让{who.2}{feel}。"),
    "opinion_yi_wei": ("{who}以{who.2}为{quality}。", "{who}认为{who.2}{quality}。"),
    "appointment_yi_wei": ("{leader}以{name}为{office}。", "{leader}任命{name}做{office}。"),
    "hearsay_wen": ("{who}闻{who.2}{act}。", "{who}听说{who.2}{act}了。"),
    "quotation_yue": ("{who}曰：“吾欲{do}。”", "{who}说：“我想要{do}。”"),
    "quotation_wei_yue": ("{who}谓{who.2}曰：“勿{do}。”", "{who}对{who.2}说：“不要{do}。”"),
    # Clauses in sequence
    "conditional_ruo_ze": ("若{who}{do}，则{who.2}{feel}。", "如果{who}{do}，{who.2}就会{feel}。"),
    "concession_sui": ("{who}虽{lack}而{virtue}。", "{who}虽然{lack}，却很{virtue}。"),
    "contrast_er": ("{who}{virtue}而{who.2}{vice}。", "{who}{virtue}，但是{who.2}{vice}。"),
    "sequence_ji_nai": ("{who}既{do}，乃{act}。", "{who}{do}之后，就{act}。"),
    "consequence_sui": (
        "{who}{deal}{who.2}，{who.2}遂{act}。",
        "{who}{deal}了{who.2}，{who.2}于是{act}。",
    ),
    "temporal_zhi_ye": ("{who}之{act}也，{who.2}{feel}。", "{who}{act}的时候，{who.2}很{feel}。"),
    "simultaneous_qie": ("{who}且{pastime}且{pastime.2}。", "{who}一边{pastime}一边{pastime.2}。"),
    "company_yu": ("{who}与{who.2}{do}。", "{who}和{who.2}一起{do}。"),
}

CONSTRUCTIONS: dict[str, tuple[Rule, ...]] = {
    **{name: (Rule(*sides),) for name, sides in _ONE_RULE.items()},
    "relative_suo": (
        Rule("{who}所{take}者，{goods}也。", "{who}{take}的是{goods}。"),
        Rule("{who}所{study}者，{book}也。", "{who}{study}的是{book}。"),
        Rule("{who}所{eat}者，{food}也。", "{who}{eat}的是{food}。"),
    ),
    "relative_zhe": (
        Rule("{do}者，{who}也。", "{do}的人是{who}。"),
        Rule("{war}{state}者，{leader}也。", "{war}{state}的人是{leader}。"),
    ),
    "purpose_yi": (
        Rule(
            "{who}{acquire}{goods}以{favour}{who.2}。",
            "{who}{acquire}{goods}，用来{favour}{who.2}。",
        ),
        Rule("{who}{go}{spot}以{do}。", "{who}{go}{spot}，为了{do}。"),
    ),
    "reason_gu": (
        Rule("{who}{virtue}，故{who.2}{esteem}之。", "{who}很{virtue}，所以{who.2}{esteem}他。"),
        Rule("{who}{vice}，故{who.2}{scorn}之。", "{who}很{vice}，所以{who.2}{scorn}他。"),
    ),
}
"""Rules by name of the construction; most constructions have one rule."""
