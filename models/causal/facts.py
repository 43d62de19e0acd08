"""Facts of the generated sentences: colours, prices, capitals and opposites.

Each table has one text of ``key=value`` entries per language, English and Chinese.
"""


def parse_entries(text: str) -> dict[str, str]:
    """Parses whitespace-separated ``key=value`` entries.

    >>> parse_entries("plum=purple lime=green")
    {'plum': 'purple', 'lime': 'green'}
    """
    return dict(entry.split("=") for entry in text.split())


def parse_words(text: str) -> tuple[str, ...]:
    """Parses whitespace-separated words.

    >>> parse_words("Emma Felix")
    ('Emma', 'Felix')
    """
    return tuple(text.split())


COLOUR = {
    "en": parse_entries("""
        plum=purple lime=green cherry=red banana=yellow coal=black snow=white sky=blue
        carrot=orange grass=green milk=white blood=red raven=black lemon=yellow violet=purple
    """),
    "zh": parse_entries("""
        李子=紫色 青柠=绿色 樱桃=红色 香蕉=黄色 煤炭=黑色 白雪=白色 天空=蓝色
        胡萝卜=橙色 青草=绿色 牛奶=白色 鲜血=红色 乌鸦=黑色 柠檬=黄色 紫罗兰=紫色
    """),
}
CAPITAL = {
    "en": parse_entries("""
        France=Paris Japan=Tokyo Egypt=Cairo Peru=Lima Norway=Oslo Kenya=Nairobi Cuba=Havana
        Italy=Rome Iran=Tehran Ghana=Accra Nepal=Kathmandu Chile=Santiago
    """),
    "zh": parse_entries("""
        法国=巴黎 日本=东京 埃及=开罗 秘鲁=利马 挪威=奥斯陆 肯尼亚=内罗毕 古巴=哈瓦那
        意大利=罗马 伊朗=德黑兰 加纳=阿克拉 尼泊尔=加德满都 智利=圣地亚哥
    """),
}
OPPOSITE = {
    "en": parse_entries("""
        hot=cold tall=short early=late rich=poor heavy=light loud=quiet wet=dry old=young
        open=closed near=far
    """),
    "zh": parse_entries("热=冷 高=低 早=晚 富=穷 重=轻 吵=静 湿=干 老=少 开=关 近=远"),
}
PRICE = {
    "en": parse_entries("""
        pencil=2 notebook=8 lamp=60 kettle=90 bicycle=800 teapot=45 ladder=150 hammer=35
        mirror=120 basket=25 clock=75 guitar=500
    """),
    "zh": parse_entries("""
        铅笔=2 笔记本=8 台灯=60 水壶=90 自行车=800 茶壶=45 梯子=150 锤子=35 镜子=120 篮子=25
        时钟=75 吉他=500
    """),
}
"""Usual price of each thing, in yuan; a sentence quotes 0.8 to 1.2 times that price."""

NAMES = {
    "en": parse_words("Anna Boris Clara David Emma Felix Greta Henry Irene Jonas Karen Louis"),
    "zh": parse_words("小明 小红 老王 老李 阿强 阿梅 张三 李四 小陈 小周 大刘 阿芳"),
}
