"""Lexicon of the synchronous grammar: Classical Chinese words with their modern translations.

Each word class is a text of ``classical=modern`` entries; an entry without ``=`` is the same in
both. Classes are defined by meaning, so that a verb and its object, or a quality and the reaction
to it, fit in every construction of `models.translation.constructions` that combines them.
"""

from typing import NamedTuple


class Word(NamedTuple):
    """A word in Classical Chinese and in modern Chinese."""

    classical: str
    modern: str


def parse_words(text: str) -> tuple[Word, ...]:
    """Parses whitespace-separated ``classical=modern`` entries.

    >>> parse_words("犬=狗 马")
    (Word(classical='犬', modern='狗'), Word(classical='马', modern='马'))
    """
    entries = (entry.partition("=") for entry in text.split())
    return tuple(Word(classical, modern or classical) for classical, _, modern in entries)


_PERSON = """
农=农夫 贾=商人 工=工匠 医=医生 渔父=渔夫 樵者=樵夫 童子=小孩 老父=老人 盗=强盗 客=客人 师=老师
弟子=学生 使者 猎者=猎人 牧人 邻人=邻居 隐士 友=朋友 仆=仆人 舟子=船夫 庖人=厨师 乐师 巫=巫师
卒=士兵 吏=官吏 书生
"""
_LEADER = "王=君王 君=国君 相=宰相 将=将军 太子 公子 大夫"
_VIRTUE = "贤=贤能 勇=勇敢 智=聪明 仁=仁慈 廉=廉洁 忠=忠诚 勤=勤劳 谦=谦虚"
_VICE = "愚=愚蠢 惰=懒惰 骄=骄傲 贪=贪婪 怯=胆怯 暴=残暴 吝=吝啬 狂=狂妄"
_ESTEEM = "敬=尊敬 爱=爱护 信=信任 慕=仰慕 重=看重"
_SCORN = "怨=怨恨 疑=怀疑 恶=厌恶 轻=轻视 弃=抛弃"

_TEXTS = {
    # People and their qualities
    "person": _PERSON,
    "leader": _LEADER,
    "who": f"{_PERSON} {_LEADER}",
    "name": "子文 子良 伯安 仲平 叔远 季和 公孙明 东郭生 南宫宜 子高 伯宁 季常",
    "you": "汝=你 子=您 尔=你们",
    "office": "相=宰相 将=将军 史=史官 医=医生 乐师 使者 大夫 师=老师 贾=商人 农=农夫",
    "virtue": _VIRTUE,
    "vice": _VICE,
    "quality": f"{_VIRTUE} {_VICE}",
    "lack": "贫=贫穷 老=年老 弱=瘦弱 贱=卑贱 病=多病 幼=年幼",
    "verdict": "乐=快乐 难=困难 易=容易 善=美好 愚=愚蠢 危=危险",
    "feel": "喜=高兴 怒=生气 忧=忧愁 惧=害怕 悲=悲伤 惊=吃惊 悔=后悔 愧=惭愧",
    "act": "歌=唱歌 舞=跳舞 哭=哭泣 笑=发笑 叹=叹息 卧=躺下 坐=坐下 走=逃跑 归=回家 拜=下拜",
    "pastime": "歌=唱歌 舞=跳舞 哭=哭泣 笑=发笑 叹=叹息 行=走路 语=说话",
    # Actions of one person towards another
    "deal": """
        责=责备 擒=捉住 逐=赶走 欺=欺骗 辱=侮辱 救=解救 召=召唤 劝=劝说 伤=打伤 荐=推荐 赏=奖赏
        罚=处罚 囚=囚禁 困=围困
    """,
    "regard": f"{_ESTEEM} {_SCORN}",
    "esteem": _ESTEEM,
    "scorn": _SCORN,
    "urge": "谏=劝谏 召=召唤 请=请求 教=教导 责=责备 问=询问",
    "heed": "听=听从 应=回应 许=答应 从=跟从 顾=理睬 谢=感谢",
    "give": "赠=赠送 赐=赏赐 借 还=归还 鬻=卖",
    "favour": "赠=赠送 谢=感谢 赏=奖赏 酬=酬谢",
    # Things and the verbs that take them as objects
    "food": "肉 鱼 果=水果 粟=小米 饼 瓜 枣=枣子 梨=梨子 粥=稀饭 桃=桃子",
    "eat": "食=吃 献=献上 求=寻求 乞=讨要 分=分享",
    "liquid": "酒 水 茶 浆=米浆 泉=泉水 露=露水",
    "drink": "饮=喝 献=献上 求=寻求 乞=讨要",
    "book": "诗=诗歌 书=书籍 经=经书 史=史书 赋=辞赋 礼=礼书 律=律法 兵法",
    "study": "读=阅读 诵=背诵 藏=收藏 学=学习 焚=烧掉 习=温习 解=讲解",
    "goods": """
        玉=玉石 剑=宝剑 琴=古琴 衣=衣服 履=鞋子 冠=帽子 弓=长弓 车=车子 舟=小船 镜=镜子 笔=毛笔
        帛=丝绸 席=席子 扇=扇子 鼎=铜鼎 珠=珍珠 金=黄金
    """,
    "take": "买=买下 鬻=卖掉 藏=收藏 献=献上 取=拿走 弃=扔掉 窃=偷走 毁=毁坏",
    "acquire": "买=买下 取=拿走 得=得到 窃=偷走",
    "crave": "求=寻求 好=喜好 贪=贪图 惜=爱惜",
    "animal": """
        马 牛 羊 犬=狗 豕=猪 虎=老虎 鹿 兔=兔子 鹤=仙鹤 雁=大雁 龟=乌龟 蛇 猿=猿猴 狐=狐狸 鸡
    """,
    "counted": """
        马=匹马 牛=头牛 羊=只羊 犬=条狗 豕=头猪 虎=只老虎 鹿=只鹿 兔=只兔子 鹤=只仙鹤 雁=只大雁
        龟=只乌龟 蛇=条蛇 猿=只猿猴 狐=只狐狸 鸡=只鸡
    """,
    "number": "二=两 三 四 五 六 七 八 九 十 百=一百 千=一千",
    "handle": "畜=饲养 追=追赶 射=射杀 杀=杀死 买=买下 鬻=卖掉 纵=放走 献=献上",
    "tool": "剑=宝剑 弓=长弓 杖=木杖 石=石头 绳=绳子 网=大网 戈=长戈",
    "hit": "击=击打 杀=杀死 捕=捕捉 伤=打伤 驱=驱赶",
    "ask": "食=吃 饮=喝 读=阅读 求=寻求 献=献上 藏=收藏 学=学习 得=得到 惧=害怕",
    # States, places, times
    "state": """
        齐=齐国 楚=楚国 秦=秦国 赵=赵国 魏=魏国 韩=韩国 燕=燕国 吴=吴国 越=越国 鲁=鲁国 宋=宋国
        卫=卫国
    """,
    "war": "伐=攻打 灭=灭掉 救=救援 袭=偷袭 侵=侵犯 围=包围",
    "spot": """
        市=集市 林=树林 野=田野 山=高山 泽=沼泽 郊=郊外 溪=小溪 庭=庭院 亭=亭子 寺=寺庙 巷=小巷
        桥=石桥 城=都城 江=江边 宫=宫殿
    """,
    "spot_in": """
        市=集市上 林=树林里 野=田野里 山=高山上 泽=沼泽边 郊=郊外 溪=小溪边 庭=庭院里 亭=亭子里
        寺=寺庙里 巷=小巷里 桥=石桥上 城=都城里 江=江边 宫=宫殿里
    """,
    "go": "往=前往 至=到达 入=进入 过=经过",
    "dwell": "在 居=住在 往=前往 宿=投宿在 归=回到 隐=隐居在",
    "time": """
        是日=这一天 明日=第二天 昔=从前 今=如今 夜=夜里 旦=早晨 春=春天 秋=秋天 冬=冬天
        既而=不久 一日=有一天 明年=第二年
    """,
}

LEXICON: dict[str, tuple[Word, ...]] = {name: parse_words(text) for name, text in _TEXTS.items()}
"""Word classes by name."""
