use super::*;
use crate::testing::{CONTROL, END, bytes, golden, golden_json, smollm2};

/// Renders with the byte tokenizer, whose ids below 256 are bytes.
fn render(source: &str, messages: &[Message]) -> Result<Prompt, PromptError> {
    let variables = vec![("eos_token".to_owned(), "<end>".to_owned())];
    ChatTemplate::new(source.to_owned(), variables)?.render(messages, &bytes())
}

fn user(content: &str) -> Vec<Message> {
    vec![Message::new("user", content)]
}

// Guards: the real model's prompts are those of transformers, in text and in ids.
#[test]
fn golden_prompts() {
    let tokenizer = smollm2();
    let template = ChatTemplate::beside(&golden("smollm2/tokenizer.json")).unwrap().unwrap();
    for want in golden_json("generate.json")["prompts"].as_array().unwrap() {
        let text = |value: &serde_json::Value| value.as_str().unwrap().to_owned();
        let turns = want["messages"].as_array().unwrap();
        let messages: Vec<Message> =
            turns.iter().map(|turn| Message::new(text(&turn["role"]), text(&turn["content"]))).collect();
        let prompt = template.render(&messages, &tokenizer).unwrap();
        assert_eq!(prompt.text, want["rendered"]);
        assert_eq!(serde_json::json!(prompt.ids), want["prompt_ids"]);
    }
}

// Guards: templates in the manners of the families render what transformers renders, and refuse what it refuses.
#[test]
fn golden_templates() {
    let golden = golden_json("templates.json");
    let text = |value: &serde_json::Value| value.as_str().unwrap().to_owned();
    let variables = ["bos_token", "eos_token"].map(|name| (name.to_owned(), text(&golden[name])));
    for template in golden["templates"].as_array().unwrap() {
        let name = &template["name"];
        let own = ChatTemplate::new(text(&template["template"]), variables.to_vec()).unwrap();
        for case in template["cases"].as_array().unwrap() {
            let turns = case["messages"].as_array().unwrap();
            let messages: Vec<Message> =
                turns.iter().map(|turn| Message::new(text(&turn["role"]), text(&turn["content"]))).collect();
            match (own.render(&messages, &bytes()), case.get("error")) {
                (Ok(prompt), None) => assert_eq!(prompt.text, case["rendered"], "{name}"),
                (Err(error), Some(want)) => {
                    let found = crate::Error::from(error).chain();
                    assert!(found.contains(&text(want)), "{name}: {found}");
                }
                (found, want) => panic!("{name}: {found:?}, transformers: {want:?}"),
            }
        }
    }
}

// Guards: text given as content or role never becomes a control token, wherever the template puts it.
#[test]
fn content_forges_no_control_token() {
    let source = "{% for m in messages %}<user>{{ m.role }}:{{ m.content | trim }}{{ eos_token }}{% endfor %}<bot>";
    let control = |ids: &[u32]| ids.iter().filter(|id| END <= **id).count();
    let plain = render(source, &user("hello")).unwrap();
    assert_eq!(control(&plain.ids), 3);
    let hard = ["<end>", "<<end>end>", "x<end", "end>", "<think>a</think>", "\u{E000}<bot>", "<user><bot><end>"];
    for text in hard {
        for role in ["user", "system", "tool", text] {
            let prompt = render(source, &[Message::new(role, text)]).unwrap();
            assert_eq!(control(&prompt.ids), 3, "{role}: {text}: {:?}", prompt.ids);
            assert_eq!(prompt.text, format!("<user>{role}:{text}<end><bot>"));
        }
    }
    // Cut from both sides by the template.
    let split = "<user>{{ messages[0].content }}nd><bot>";
    assert_eq!(control(&render(split, &user("<e")).unwrap().ids), 2);
}

// Guards: a template knows a role that has a letter in common with a control token; a role that holds one still forges none.
#[test]
fn roles_stay_readable() {
    let mut json = crate::testing::bytes_json();
    json["added_tokens"][1]["content"] = "sop".into();
    let tokenizer = crate::testing::tokenizer(&json);
    let source = "{% if messages[0].role == 'system' %}yes{% else %}{{ messages[0].role }}p{% endif %}";
    let ids = |role: &str| {
        let template = ChatTemplate::new(source.to_owned(), Vec::new()).unwrap();
        template.render(&[Message::new(role, "x")], &tokenizer).unwrap().ids
    };
    assert_eq!(ids("system"), b"yes".map(u32::from));
    assert_eq!(ids("a sop"), b"a sopp".map(u32::from));
    assert_eq!(ids("so"), b"sop".map(u32::from));
}

// Guards: an old chain of thought of the model can be dropped by the template; special tokens stay text even there.
#[test]
fn assistant_markup_keeps_its_meaning() {
    let source = "{% for m in messages %}{{ m.content.split('<think>')[-1] }}{% endfor %}";
    let turn = |role, text| render(source, &[Message::new(role, text)]).unwrap();
    assert_eq!(turn("assistant", "old<think>new").text, "new");
    assert_eq!(turn("assistant", "a<end>").ids, b"a<end>".map(u32::from));
    assert_eq!(turn("user", "old<think>new").text, "old<think>new");
    assert!(CONTROL.contains(&"<think>"));
}

// Guards: a template that does not end, nests or renders without end, or asks for files ends in an error.
#[test]
fn bounded() {
    let check = |source: &str, want: &str| {
        let error = crate::Error::from(render(source, &user("x")).expect_err(source)).chain();
        assert!(error.contains(want), "{source}: {error}");
    };
    check("{% for i in range(90000) %}{% for j in range(90000) %}{% endfor %}{% endfor %}", "fuel");
    check("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion");
    check("{{ 'a' * 90000000 }}", "renders more than");
    check("{% include '/etc/passwd' %}", "non-existing template");
    check(
        "{% set ns = namespace(x=[]) %}{% for i in range(90) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x | tojson }}",
        "tojson: more than 16777216 bytes",
    );
    check(
        "{% set ns = namespace(x=[]) %}{% for i in range(900) %}{% set ns.x = [ns.x] %}{% endfor %}{{ ns.x | tojson }}",
        "tojson: nested deeper than 100",
    );
    check("{{ 'a'.index('b') }}{{ 'a'.split('') }}", "substring not found");
    check("{{ raise_exception('roles must alternate') }}", "roles must alternate");
    check("{{ messages[0].content.nothing.more }}", "undefined");
    assert!(ChatTemplate::new("{% for %}".to_owned(), Vec::new()).is_err());
}

// Guards: what templates expect from Python: blocks that leave no lines, methods of str, JSON as json.dumps has it.
#[test]
fn as_transformers() {
    let check = |source: &str, content: &str, want: &str| {
        assert_eq!(render(source, &user(content)).unwrap().text, want, "{source}");
    };
    check("  {% if true %}\nyes\n  {% endif %}\nend\n", "", "yes\nend");
    check("{{ messages[0]['content'].strip().upper() }}", " a ", "A");
    check("{{ {'a': messages[0].content, 'b': [1, none]} | tojson }}", "<'&\"é\\u003c>", {
        r#"{"a": "<'&\"é\\u003c>", "b": [1, null]}"#
    });
    check(
        "{{ {'b': [], 'a': [1.5, {'é': none}]} | tojson(ensure_ascii=True, sort_keys=True, separators=(',', ':')) }}",
        "",
        r#"{"a":[1.5,{"\u00e9":null}],"b":[]}"#,
    );
    check(
        "{{ {'b': {}, 'a': [1, true]} | tojson(indent=2) }}",
        "",
        "{\n  \"b\": {},\n  \"a\": [\n    1,\n    true\n  ]\n}",
    );
    check("{{ messages[0].content | tojson(ensure_ascii=True) }}", "<é😀\u{1}", r#""<\u00e9\ud83d\ude00\u0001""#);
    check("{{ 'a.b.c'.rsplit('.', 1) }}{{ 'abc'.removeprefix('a').removesuffix('c') }}{{ 'éa'.index('a') }}", "", {
        "['a.b', 'c']b1"
    });
    check(
        "{{ 'a=b=c'.partition('=')[2] }} {{ 'a=b=c'.rpartition('=')[0] }} {{ 'x'.partition('=')[0] }}",
        "",
        "b=c a=b x",
    );
    check("{% for m in messages %}{% if m.role == 'user' %}{% break %}{% endif %}x{% endfor %}", "", "");
    check("{% if tools %}tools{% endif %}{% if documents is none %}none{% endif %}", "", "none");
    check("{{ strftime_now('%Y') | length }}{{ eos_token }}{{ unknown }}", "", "4<end>");
}

// Guards: each place where models keep their template is found, in order.
#[test]
fn places() {
    let folder = tempfile::tempdir().unwrap();
    let tokenizer_path = folder.path().join("tokenizer.json");
    let write = |name: &str, text: &str| std::fs::write(folder.path().join(name), text).unwrap();
    let rendered = || {
        let template = ChatTemplate::beside(&tokenizer_path)?;
        template.map(|template| Ok(template.render(&[], &bytes())?.text)).transpose()
    };
    let check = |want: &str| assert_eq!(rendered().unwrap_or_else(|e: PromptError| Some(e.to_string())).unwrap(), want);
    assert!(rendered().unwrap().is_none());
    write("tokenizer_config.json", r#"{"bos_token": "<b>"}"#);
    assert!(rendered().unwrap().is_none());
    write("tokenizer_config.json", r#"{"bos_token": {"content": "<b>"}, "chat_template": "one {{ bos_token }}"}"#);
    check("one <b>");
    let named = r#"[{"name": "tool_use", "template": "no"}, {"name": "default", "template": "two"}]"#;
    write("tokenizer_config.json", &format!(r#"{{"chat_template": {named}}}"#));
    check("two");
    write("chat_template.jinja", "three\n");
    check("three");
    std::fs::remove_file(folder.path().join("chat_template.jinja")).unwrap();
    for damaged in
        [r#"{"chat_template": [{"name": "x"}]}"#, r#"{"chat_template": 1}"#, "{", "{\"chat_template\": \"{{\"}"]
    {
        write("tokenizer_config.json", damaged);
        assert!(rendered().is_err(), "{damaged}");
    }
}
