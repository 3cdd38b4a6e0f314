//! The part of Go's templates that the chart may use; `helm` and this module must agree on it.
//!
//! * `{{ pipeline }}`, with `{{-` and `-}}` trimming blanks, and comments `{{/* … */}}`
//! * `{{ if p }} … {{ else if p }} … {{ else }} … {{ end }}`
//! * `{{ range $key, $value := p }} … {{ end }}` over a map or a list
//! * operands: `.A.B` from the root, `$variable`, `"text"`, numbers, `true`, `false`, `(pipeline)`
//! * functions: `and`, `default`, `eq`, `fail`, `index`, `nindent`, `not`, `or`, `quote`,
//!   `sha256sum`, `toJson`, `toYaml`
//!
//! A field that does not exist is null, as in Go. One difference: `toYaml` writes YAML's flow style,
//! which is the same value.

use std::collections::BTreeMap;

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;
use sha2::{Digest, Sha256};

/// Evaluates a template.
pub(super) fn render(template: &str, root: &Value) -> Result<String> {
    let mut pieces = pieces(template)?.into_iter().peekable();
    let (nodes, end) = block(&mut pieces)?;
    ensure!(end.is_none(), "{:?} without a beginning", end.unwrap_or_default());
    let mut out = String::new();
    evaluate(&nodes, &Scope { root, variables: BTreeMap::new() }, &mut out)?;
    Ok(out)
}

// ---------------------------------------------------------------- reading

#[derive(Debug)]
enum Piece {
    Text(String),
    Action(String),
}

/// Text and actions, with blanks trimmed where the actions say so.
fn pieces(template: &str) -> Result<Vec<Piece>> {
    let mut pieces = Vec::new();
    let mut rest = template;
    let mut trim_next = false;
    while let Some(start) = rest.find("{{") {
        let (text, action) = (&rest[..start], &rest[start + 2..]);
        let end = action.find("}}").context("an action without `}}`")?;
        let (mut action, after) = (&action[..end], &action[end + 2..]);
        let text = if trim_next { text.trim_start() } else { text };
        let text = match action.strip_prefix("- ") {
            Some(inner) => {
                action = inner;
                text.trim_end()
            }
            None => text,
        };
        trim_next = action.ends_with(" -");
        let action = action.strip_suffix(" -").unwrap_or(action).trim();
        pieces.push(Piece::Text(text.to_owned()));
        if !action.starts_with("/*") {
            pieces.push(Piece::Action(action.to_owned()));
        }
        rest = after;
    }
    let text = if trim_next { rest.trim_start() } else { rest };
    pieces.push(Piece::Text(text.to_owned()));
    Ok(pieces)
}

#[derive(Debug)]
enum Node {
    Text(String),
    Print(Pipeline),
    If { branches: Vec<(Pipeline, Vec<Node>)>, otherwise: Vec<Node> },
    Range { key: String, value: String, map: Pipeline, body: Vec<Node> },
}

type Pieces = std::iter::Peekable<std::vec::IntoIter<Piece>>;

/// Nodes up to an `else` or `end`, which is returned too.
fn block(pieces: &mut Pieces) -> Result<(Vec<Node>, Option<String>)> {
    let mut nodes = Vec::new();
    while let Some(piece) = pieces.next() {
        let action = match piece {
            Piece::Text(text) => {
                nodes.push(Node::Text(text));
                continue;
            }
            Piece::Action(action) => action,
        };
        let (word, rest) = action.split_once(' ').unwrap_or((&action, ""));
        match word {
            "end" | "else" => return Ok((nodes, Some(action))),
            "if" => nodes.push(branches(pieces, rest)?),
            "range" => nodes.push(range(pieces, rest)?),
            _ => nodes.push(Node::Print(Pipeline::parse(&action)?)),
        }
    }
    Ok((nodes, None))
}

fn branches(pieces: &mut Pieces, condition: &str) -> Result<Node> {
    let mut condition = Pipeline::parse(condition)?;
    let mut branches = Vec::new();
    loop {
        let (body, end) = block(pieces)?;
        branches.push((condition, body));
        let end = end.context("an `if` without `end`")?;
        if end == "end" {
            return Ok(Node::If { branches, otherwise: Vec::new() });
        }
        if let Some(next) = end.strip_prefix("else if ") {
            condition = Pipeline::parse(next)?;
            continue;
        }
        let (otherwise, end) = block(pieces)?;
        ensure!(end.as_deref() == Some("end"), "an `else` without `end`");
        return Ok(Node::If { branches, otherwise });
    }
}

fn range(pieces: &mut Pieces, head: &str) -> Result<Node> {
    let (names, map) = head.split_once(":=").context("`range` needs `$key, $value := map`")?;
    let (key, value) = names.split_once(',').context("`range` needs `$key, $value := map`")?;
    let (body, end) = block(pieces)?;
    ensure!(end.as_deref() == Some("end"), "a `range` without `end`");
    let name = |text: &str| text.trim().to_owned();
    Ok(Node::Range { key: name(key), value: name(value), map: Pipeline::parse(map)?, body })
}

/// Commands, each of which gets the result of the one before as its last argument.
#[derive(Debug)]
struct Pipeline(Vec<Vec<Operand>>);

#[derive(Debug)]
enum Operand {
    Field(Vec<String>),
    Variable(String),
    Function(String),
    Literal(Value),
    Nested(Pipeline),
}

impl Pipeline {
    fn parse(text: &str) -> Result<Self> {
        let mut rest = text.trim_start();
        let pipeline = Self::read(&mut rest).with_context(|| format!("in {text:?}"))?;
        ensure!(rest.is_empty(), "{rest:?} is too much in {text:?}");
        Ok(pipeline)
    }

    fn read(rest: &mut &str) -> Result<Self> {
        let mut commands = vec![Vec::new()];
        loop {
            *rest = rest.trim_start();
            let Some(first) = rest.chars().next().filter(|&first| first != ')') else { break };
            if first == '|' {
                *rest = &rest[1..];
                commands.push(Vec::new());
                continue;
            }
            let operand = operand(rest, first)?;
            if let Some(command) = commands.last_mut() {
                command.push(operand);
            }
        }
        ensure!(commands.iter().all(|command| !command.is_empty()), "nothing before or after `|`");
        Ok(Self(commands))
    }
}

fn operand(rest: &mut &str, first: char) -> Result<Operand> {
    match first {
        '(' => {
            *rest = &rest[1..];
            let nested = Pipeline::read(rest)?;
            *rest = rest.strip_prefix(')').context("`(` without `)`")?;
            Ok(Operand::Nested(nested))
        }
        '"' => {
            let mut literals = serde_json::Deserializer::from_str(rest).into_iter::<Value>();
            let literal = literals.next().context("a text without end")??;
            *rest = &rest[literals.byte_offset()..];
            Ok(Operand::Literal(literal))
        }
        _ => {
            let end = rest.find([' ', '\t', '|', '(', ')']).unwrap_or(rest.len());
            let (word, after) = rest.split_at(end);
            *rest = after;
            word_operand(word)
        }
    }
}

fn word_operand(word: &str) -> Result<Operand> {
    if let Some(path) = word.strip_prefix('.') {
        ensure!(!path.is_empty(), "`.` alone is not supported");
        return Ok(Operand::Field(path.split('.').map(str::to_owned).collect()));
    }
    if word.starts_with('$') {
        return Ok(Operand::Variable(word.to_owned()));
    }
    if word == "true" || word == "false" || word.starts_with(|c: char| c.is_ascii_digit()) {
        return Ok(Operand::Literal(serde_json::from_str(word)?));
    }
    Ok(Operand::Function(word.to_owned()))
}

// ---------------------------------------------------------------- evaluating

struct Scope<'a> {
    root: &'a Value,
    variables: BTreeMap<String, Value>,
}

fn evaluate(nodes: &[Node], scope: &Scope<'_>, out: &mut String) -> Result<()> {
    for node in nodes {
        match node {
            Node::Text(text) => out.push_str(text),
            Node::Print(pipeline) => out.push_str(&print(&pipeline.value(scope)?)),
            Node::If { branches, otherwise } => {
                let mut chosen = otherwise;
                for (condition, body) in branches {
                    if is_true(&condition.value(scope)?) {
                        chosen = body;
                        break;
                    }
                }
                evaluate(chosen, scope, out)?;
            }
            Node::Range { key, value, map, body } => {
                for (name, content) in entries(map.value(scope)?)? {
                    let mut variables = scope.variables.clone();
                    variables.insert(key.clone(), name);
                    variables.insert(value.clone(), content);
                    evaluate(body, &Scope { root: scope.root, variables }, out)?;
                }
            }
        }
    }
    Ok(())
}

/// What `range` goes through.
fn entries(value: Value) -> Result<Vec<(Value, Value)>> {
    Ok(match value {
        // Sorted, as Go has them.
        Value::Object(map) => {
            let sorted = map.into_iter().collect::<BTreeMap<_, _>>();
            sorted.into_iter().map(|(key, value)| (key.into(), value)).collect()
        }
        Value::Array(list) => (0..).map(Value::from).zip(list).collect(),
        Value::Null => Vec::new(),
        _ => bail!("`range` is for maps and lists only"),
    })
}

impl Pipeline {
    fn value(&self, scope: &Scope<'_>) -> Result<Value> {
        let mut piped: Option<Value> = None;
        for command in &self.0 {
            let (head, arguments) = command.split_first().context("an empty command")?;
            let mut values = Vec::new();
            for argument in arguments {
                values.push(argument.value(scope)?);
            }
            values.extend(piped.take());
            piped = Some(match head {
                Operand::Function(name) => call(name, &values).with_context(|| name.clone())?,
                _ if values.is_empty() => head.value(scope)?,
                _ => bail!("{head:?} is no function and takes no arguments"),
            });
        }
        piped.context("an empty pipeline")
    }
}

impl Operand {
    fn value(&self, scope: &Scope<'_>) -> Result<Value> {
        match self {
            Self::Field(path) => {
                let mut value = scope.root;
                for name in path {
                    let map = value.as_object();
                    let map = map.with_context(|| format!("nothing has .{}", path.join(".")))?;
                    value = map.get(name).unwrap_or(&Value::Null);
                }
                Ok(value.clone())
            }
            Self::Variable(name) => {
                scope.variables.get(name).cloned().with_context(|| format!("there is no {name}"))
            }
            Self::Function(name) => call(name, &[]).with_context(|| name.clone()),
            Self::Literal(value) => Ok(value.clone()),
            Self::Nested(pipeline) => pipeline.value(scope),
        }
    }
}

fn call(name: &str, arguments: &[Value]) -> Result<Value> {
    Ok(match (name, arguments) {
        ("quote", [value]) => Value::from(print(value)).to_string().into(),
        ("toYaml" | "toJson", [value]) => json(value).into(),
        ("sha256sum", [value]) => hex(&Sha256::digest(print(value))).into(),
        ("nindent", [width, text]) => {
            let width = usize::try_from(width.as_u64().context("wants a number")?)?;
            let pad = " ".repeat(width);
            format!("\n{pad}{}", print(text).replace('\n', &format!("\n{pad}"))).into()
        }
        ("default", [default, value]) => if is_true(value) { value } else { default }.clone(),
        ("index", [map, key]) => {
            let key = key.as_str().context("wants a text as key")?;
            map.as_object().context("wants a map")?.get(key).cloned().unwrap_or_default()
        }
        ("not", [value]) => (!is_true(value)).into(),
        ("eq", [one, other]) => (one == other).into(),
        ("fail", [why]) => bail!(print(why)),
        ("and", [.., last]) => arguments.iter().find(|it| !is_true(it)).unwrap_or(last).clone(),
        ("or", [.., last]) => arguments.iter().find(|it| is_true(it)).unwrap_or(last).clone(),
        _ => bail!("no such function of {} arguments", arguments.len()),
    })
}

fn print(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        other => json(other),
    }
}

/// As Go writes it: sorted, without blanks, and safe inside HTML.
fn json(value: &Value) -> String {
    let text = sorted(value).to_string();
    text.replace('<', "\\u003c").replace('>', "\\u003e").replace('&', "\\u0026")
}

fn sorted(value: &Value) -> Value {
    match value {
        Value::Object(map) => {
            let sorted: BTreeMap<_, _> = map.iter().map(|(key, it)| (key, sorted(it))).collect();
            sorted.into_iter().map(|(key, it)| (key.clone(), it)).collect()
        }
        Value::Array(items) => items.iter().map(sorted).collect(),
        other => other.clone(),
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn is_true(value: &Value) -> bool {
    match value {
        Value::Null => false,
        Value::Bool(value) => *value,
        Value::Number(number) => number.as_f64() != Some(0.0),
        Value::String(text) => !text.is_empty(),
        Value::Array(items) => !items.is_empty(),
        Value::Object(map) => !map.is_empty(),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn rendered(template: &str) -> String {
        let root = json!({ "Values": {
            "name": "web", "empty": "", "on": true, "count": 2, "list": [1, "a"],
            "map": { "b": "2", "a": "<1>" },
        }});
        render(template, &root).unwrap()
    }

    #[test]
    fn values_are_printed_and_piped() {
        assert_eq!(rendered("a {{ .Values.name }}!"), "a web!");
        assert_eq!(rendered("{{ .Values.count | quote }}"), "\"2\"");
        assert_eq!(rendered("{{ .Values.empty | default \"x y\" }}"), "x y");
        assert_eq!(rendered("{{ index .Values.map \"b\" }}"), "2");
        assert_eq!(rendered("l: {{- toYaml .Values.list | nindent 2 }}"), "l:\n  [1,\"a\"]");
        assert_eq!(rendered("{{ toJson .Values.map }}"), r#"{"a":"\u003c1\u003e","b":"2"}"#);
        // sha256 of the text above.
        assert_eq!(rendered("{{ \"\" | sha256sum }}")[..8], *"e3b0c442");
    }

    #[test]
    fn blanks_are_trimmed_where_asked() {
        assert_eq!(rendered("a\n  {{- .Values.name -}}\n  b"), "awebb");
        assert_eq!(rendered("a\n{{- /* nothing */ -}}\nb"), "ab");
    }

    #[test]
    fn branches_and_loops() {
        let choice = |condition: &str| {
            rendered(&format!("{{{{ if {condition} }}}}yes{{{{ else }}}}no{{{{ end }}}}"))
        };
        assert_eq!(choice(".Values.on"), "yes");
        assert_eq!(choice(".Values.empty"), "no");
        assert_eq!(choice("eq .Values.name \"web\""), "yes");
        assert_eq!(choice("and .Values.on (not .Values.empty)"), "yes");
        assert_eq!(choice("or .Values.empty .Values.list"), "yes");
        let chain = "{{ if .Values.empty }}1{{ else if .Values.on }}2{{ else }}3{{ end }}";
        assert_eq!(rendered(chain), "2");
        let range = "{{- range $k, $v := .Values.map }}{{ $k }}={{ $v }};{{ end }}";
        assert_eq!(rendered(range), "a=<1>;b=2;");
        let range = "{{- range $k, $v := .Values.list }}{{ $k }}={{ $v }};{{ end }}";
        assert_eq!(rendered(range), "0=1;1=a;");
    }

    #[test]
    fn a_template_refuses_in_its_own_words() {
        let error = render("{{ fail \"not so\" }}", &json!({})).unwrap_err();
        assert_eq!(error.root_cause().to_string(), "not so");
    }

    #[test]
    fn what_is_not_supported_is_an_error() {
        for template in [
            "{{ .Values.nothing.at.all }}",
            "{{ .Values.name",
            "{{ include \"x\" . }}",
            "{{ if .Values.on }}",
            "{{ end }}",
            "{{ $x }}",
            "{{ .Values.name | }}",
        ] {
            assert!(render(template, &json!({ "Values": { "name": "x", "on": true } })).is_err());
        }
    }
}
