//! containerd's filters, as `Walk` takes them.
//!
//! ```text
//! filter   := selector ("," selector)*          all of them must match
//! selector := fieldpath [operator value]         without: the field is there
//! fieldpath:= field ("." field)*
//! field    := quoted | [A-Za-z0-9_]+
//! operator := "==" | "!=" | "~="                 the last one takes a regular expression
//! value    := quoted | [^\s,]+
//! quoted   := a Go string; after "~=" also between "/" or "|"
//! ```
//!
//! Of several filters one must match; none, or an empty one, matches everything.

use regex::Regex;
use std::iter::Peekable;
use std::str::Chars;

/// A filter that cannot be read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the filter {filter:?} is wrong: {why}")]
pub struct FilterError {
    filter: String,
    why: String,
}

/// Several filters, of which one must match.
#[derive(Debug)]
pub struct Filters(Vec<Vec<Selector>>);

#[derive(Debug)]
struct Selector {
    path: Vec<String>,
    test: Test,
}

#[derive(Debug)]
enum Test {
    Present,
    Equal(String),
    Unequal(String),
    Matches(Regex),
}

impl Filters {
    /// Reads filters.
    pub fn parse(filters: &[String]) -> Result<Self, FilterError> {
        let parse = |filter: &String| {
            if filter.is_empty() {
                return Ok(Vec::new());
            }
            selectors(filter).map_err(|why| FilterError {
                filter: filter.clone(),
                why,
            })
        };
        filters
            .iter()
            .map(parse)
            .collect::<Result<_, _>>()
            .map(Self)
    }

    /// Whether one of them matches something whose fields `get` looks up; absent
    /// fields are `None`.
    pub fn matches<'a>(&self, get: impl Fn(&[String]) -> Option<&'a str>) -> bool {
        let selects = |selector: &Selector| {
            let value = get(&selector.path);
            match &selector.test {
                Test::Present => value.is_some(),
                Test::Equal(wanted) => value == Some(wanted),
                Test::Unequal(unwanted) => value != Some(unwanted),
                Test::Matches(regex) => value.is_some_and(|value| regex.is_match(value)),
            }
        };
        self.0.is_empty() || self.0.iter().any(|all| all.iter().all(selects))
    }
}

type Input<'a> = Peekable<Chars<'a>>;

fn selectors(filter: &str) -> Result<Vec<Selector>, String> {
    let mut input = filter.chars().peekable();
    let mut all = Vec::new();
    loop {
        all.push(selector(&mut input)?);
        match next_token(&mut input) {
            None => return Ok(all),
            Some(',') => {
                input.next();
            }
            Some(other) => return Err(format!("{other:?} is not expected there")),
        }
    }
}

/// Skips blanks; the next character stays.
fn next_token(input: &mut Input<'_>) -> Option<char> {
    while input.next_if(|c| c.is_whitespace()).is_some() {}
    input.peek().copied()
}

fn selector(input: &mut Input<'_>) -> Result<Selector, String> {
    let mut path = vec![field(input)?];
    while next_token(input) == Some('.') {
        input.next();
        path.push(field(input)?);
    }
    if matches!(next_token(input), None | Some(',')) {
        return Ok(Selector {
            path,
            test: Test::Present,
        });
    }
    let mut operator = String::new();
    while let Some(c) = input.next_if(|c| matches!(c, '=' | '!' | '~')) {
        operator.push(c);
    }
    let test = match operator.as_str() {
        "==" => Test::Equal(value(input, false)?),
        "!=" => Test::Unequal(value(input, false)?),
        "~=" => {
            let text = value(input, true)?;
            let regex = Regex::new(&text);
            Test::Matches(
                regex.map_err(|error| format!("{text:?} is no regular expression: {error}"))?,
            )
        }
        other => return Err(format!("{other:?} is no operator; there are ==, != and ~=")),
    };
    Ok(Selector { path, test })
}

fn field(input: &mut Input<'_>) -> Result<String, String> {
    match next_token(input) {
        Some('"') => quoted(input),
        Some(c) if c.is_ascii_alphanumeric() || c == '_' => {
            let mut name = String::new();
            while let Some(c) = input.next_if(|c| c.is_ascii_alphanumeric() || *c == '_') {
                name.push(c);
            }
            Ok(name)
        }
        Some(other) => Err(format!("a field is expected, not {other:?}")),
        None => Err("a field is missing".to_owned()),
    }
}

fn value(input: &mut Input<'_>, regex: bool) -> Result<String, String> {
    match next_token(input) {
        None | Some(',') => Err("a value is missing".to_owned()),
        Some('"') => quoted(input),
        Some('/' | '|') if regex => quoted(input),
        Some(quote @ ('/' | '|')) => Err(format!("{quote:?} quotes regular expressions only")),
        Some(_) => {
            let mut text = String::new();
            while let Some(c) = input.next_if(|c| *c != ',' && !c.is_whitespace()) {
                text.push(c);
            }
            Ok(text)
        }
    }
}

/// A Go string with any of the quotes.
fn quoted(input: &mut Input<'_>) -> Result<String, String> {
    let open = || "a quoted text does not end".to_owned();
    let quote = input.next().ok_or_else(open)?;
    let mut bytes = Vec::new();
    let mut utf8 = [0; 4];
    let mut push = |bytes: &mut Vec<u8>, c: char| {
        bytes.extend_from_slice(c.encode_utf8(&mut utf8).as_bytes());
    };
    loop {
        match input.next().ok_or_else(open)? {
            c if c == quote => break,
            '\n' => return Err(open()),
            '\\' => match input.next().ok_or_else(open)? {
                'a' => bytes.push(7),
                'b' => bytes.push(8),
                'f' => bytes.push(12),
                'n' => bytes.push(b'\n'),
                'r' => bytes.push(b'\r'),
                't' => bytes.push(b'\t'),
                'v' => bytes.push(11),
                'x' => bytes.push(byte(number(input, 2, 16)?)?),
                c @ '0'..='7' => {
                    let first = c.to_digit(8).unwrap_or_default();
                    bytes.push(byte(first * 64 + number(input, 2, 8)?)?);
                }
                c @ ('u' | 'U') => {
                    let value = number(input, if c == 'u' { 4 } else { 8 }, 16)?;
                    let c = char::from_u32(value).ok_or("an escape is no character")?;
                    push(&mut bytes, c);
                }
                c if c == '\\' || c == quote => push(&mut bytes, c),
                // Regular expressions have escapes of their own.
                c if quote != '"' => {
                    bytes.push(b'\\');
                    push(&mut bytes, c);
                }
                c => return Err(format!("\\{c} is no escape")),
            },
            c => push(&mut bytes, c),
        }
    }
    String::from_utf8(bytes).map_err(|_| "a quoted text is not UTF-8".to_owned())
}

fn number(input: &mut Input<'_>, digits: usize, radix: u32) -> Result<u32, String> {
    let mut value: u32 = 0;
    for _ in 0..digits {
        let digit = input.next().and_then(|c| c.to_digit(radix));
        let digit = digit.ok_or("an escape has too few digits")?;
        value = value.wrapping_mul(radix).wrapping_add(digit);
    }
    Ok(value)
}

fn byte(value: u32) -> Result<u8, String> {
    u8::try_from(value).map_err(|_| "an escape is no byte".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A snapshot with a label.
    fn get(path: &[String]) -> Option<&'static str> {
        let path: Vec<_> = path.iter().map(String::as_str).collect();
        match path.as_slice() {
            ["kind"] => Some("committed"),
            ["name"] => Some("default/1/sha256:ab"),
            ["parent"] => Some(""),
            ["labels", "containerd.io/snapshot.ref"] => Some("sha256:ab"),
            ["labels", "a"] => Some("x,\"y"),
            _ => None,
        }
    }

    #[test]
    fn filters_mean_what_containerd_means() {
        for (filter, expected) in [
            ("", true),
            ("kind==committed", true),
            ("kind == committed", true),
            ("kind==active", false),
            ("kind!=active", true),
            (
                r#"labels."containerd.io/snapshot.ref"==sha256:ab,parent=="""#,
                true,
            ),
            (
                r#"labels."containerd.io/snapshot.ref"==sha256:ab,parent=="x""#,
                false,
            ),
            (r#"labels."containerd.io/snapshot.ref""#, true),
            ("labels.other", false),
            ("labels.other!=x", true),
            (r#"labels.a=="x,\"y""#, true),
            (r#"labels.a=="x,\x22y""#, true),
            (r#"name~="^default/[0-9]+/""#, true),
            (r"name~=/^default\/\d+\/sha256:/", true),
            ("name~=|^other|", false),
            ("name~=1/sha", true),
        ] {
            let filters = Filters::parse(&[filter.to_owned()]).unwrap();
            assert_eq!(filters.matches(get), expected, "{filter}");
        }
        let either = ["kind==active".to_owned(), "kind==committed".to_owned()];
        assert!(Filters::parse(&either).unwrap().matches(get));
        assert!(Filters::parse(&[]).unwrap().matches(get));
    }

    #[test]
    fn nonsense_is_refused() {
        for filter in [
            "kind==",
            "==x",
            "kind=x",
            "kind==a b",
            "kind==\"x",
            "name~=(",
            "kind,",
            "a..b",
            "a==/x/",
            r#"a=="\q""#,
        ] {
            assert!(Filters::parse(&[filter.to_owned()]).is_err(), "{filter}");
        }
    }
}
