//! What a `hosts.toml` says; see [`hosts`](super::hosts).

use super::hosts::{Capabilities, Host, client, pem, wrong};
use crate::ImageError;
use reqwest::Url;
use reqwest::header::{HeaderName, HeaderValue};
use std::path::{Path, PathBuf};
use std::time::Duration;
use toml_edit::{Document, Item, TableLike};

/// What `hosts.toml` says.
pub(super) fn parse(
    path: &Path,
    text: &[u8],
    registry: &str,
    itself: Host,
) -> Result<Vec<Host>, ImageError> {
    let text = std::str::from_utf8(text).map_err(|error| wrong(path, "", error.to_string()))?;
    let document =
        Document::parse(text).map_err(|error| wrong(path, "", error.to_string().trim_end()))?;
    let mut hosts = Vec::new();
    if let Some(item) = document.get("host") {
        let tables = item
            .as_table_like()
            .ok_or_else(|| wrong(path, "host", "it is no table; write [host.\"https://…\"]"))?;
        for (address, item) in in_order(tables) {
            let field = format!("host.{address:?}");
            let table = item
                .as_table_like()
                .ok_or_else(|| wrong(path, &field, "it is no table"))?;
            let file = File {
                path,
                field,
                table,
                known: HOST_FIELDS,
            };
            hosts.push(file.host(address, None)?);
        }
    }
    let file = File {
        path,
        field: String::new(),
        table: document.as_table(),
        known: SERVER_FIELDS,
    };
    let server = match document.get("server") {
        Some(item) => match item.as_str() {
            Some(server) => server.to_owned(),
            None => return Err(wrong(path, "server", "it is no string")),
        },
        None => String::new(),
    };
    let itself = match server.is_empty() {
        true => file.host("", Some(itself))?,
        false => Host {
            itself: true,
            ..file.host(&server, None)?
        },
    };
    hosts.push(itself);
    tracing::debug!(registry, ?path, hosts = hosts.len(), "hosts from a file");
    Ok(hosts)
}

/// A table's items in the order of the file, wherever in it they are.
fn in_order(table: &dyn TableLike) -> Vec<(&str, &Item)> {
    let mut items: Vec<_> = table.iter().collect();
    items.sort_by_key(|(_, item)| item.span().map_or(usize::MAX, |span| span.start));
    items
}

const HOST_FIELDS: &[&str] = &[
    "capabilities",
    "ca",
    "client",
    "skip_verify",
    "header",
    "override_path",
    "dial_timeout",
];
const SERVER_FIELDS: &[&str] = &[
    "server",
    "host",
    "capabilities",
    "ca",
    "client",
    "skip_verify",
    "header",
    "override_path",
    "dial_timeout",
];

/// A part of a file.
struct File<'a> {
    path: &'a Path,
    /// What it is called there; empty for all of it.
    field: String,
    table: &'a dyn TableLike,
    known: &'a [&'a str],
}

impl File<'_> {
    fn name(&self, field: &str) -> String {
        match self.field.is_empty() {
            true => field.to_owned(),
            false => format!("{}.{field}", self.field),
        }
    }

    fn wrong(&self, field: &str, why: impl Into<String>) -> ImageError {
        wrong(self.path, &self.name(field), why)
    }

    /// Reads a host that is called `address`, or adds to the one that is given.
    fn host(&self, address: &str, given: Option<Host>) -> Result<Host, ImageError> {
        for (field, _) in self.table.iter() {
            if !self.known.contains(&field) {
                let (path, field) = (self.path, self.name(field));
                tracing::warn!(?path, field, "this field is not known, and does nothing");
            }
        }
        let override_path = self.boolean("override_path")?;
        let mut host = match given {
            Some(given) => given,
            None => Host {
                itself: false,
                base: self.address(address, override_path)?,
                can: Capabilities::ALL,
                authorities: Vec::new(),
                client: None,
                skip_verify: false,
                headers: Vec::new(),
                dial_timeout: None,
            },
        };
        if let Some(can) = self.capabilities()? {
            host.can = can;
        }
        host.skip_verify = self.boolean("skip_verify")?;
        for file in self.strings("ca")? {
            let file = self.beside(&file);
            host.authorities
                .push(pem(self.path, &self.name("ca"), &file)?);
        }
        host.client = self.client()?;
        host.headers = self.headers()?;
        host.dial_timeout = match self.table.get("dial_timeout") {
            None => None,
            Some(item) => {
                let duration = item.as_str().and_then(duration);
                let why = "it is no time such as \"2s\" or \"500ms\"";
                Some(duration.ok_or_else(|| self.wrong("dial_timeout", why))?)
            }
        };
        Ok(host)
    }

    /// Paths are meant from the file on.
    fn beside(&self, file: &str) -> PathBuf {
        self.path.with_file_name("").join(file)
    }

    fn address(&self, address: &str, override_path: bool) -> Result<Url, ImageError> {
        let field = if self.field.is_empty() { "server" } else { "" };
        let error = |why: String| match field {
            "" => wrong(self.path, &self.field, why),
            field => self.wrong(field, why),
        };
        let text = match address.contains("://") {
            true => address.to_owned(),
            false => format!("https://{address}"),
        };
        let mut url = Url::parse(&text).map_err(|why| error(format!("it is no address: {why}")))?;
        if !matches!(url.scheme(), "http" | "https") || !url.has_host() {
            return Err(error(
                "it is no address with http:// or https://".to_owned(),
            ));
        }
        if !url.username().is_empty() || url.password().is_some() {
            // Not shown: it would be in every log.
            return Err(wrong(
                self.path,
                if field.is_empty() { "host" } else { field },
                "the address of a host has credentials in it: use docker login or skopeo login",
            ));
        }
        url.set_query(None);
        url.set_fragment(None);
        let mut path = url.path().trim_end_matches('/').to_owned();
        if !override_path && !path.ends_with("/v2") {
            path += "/v2";
        }
        url.set_path(&(path + "/"));
        Ok(url)
    }

    fn capabilities(&self) -> Result<Option<Capabilities>, ImageError> {
        if self.table.get("capabilities").is_none() {
            return Ok(None);
        }
        let mut can = Capabilities {
            pull: false,
            resolve: false,
            push: false,
        };
        for name in self.strings("capabilities")? {
            match name.to_ascii_lowercase().as_str() {
                "pull" => can.pull = true,
                "resolve" => can.resolve = true,
                "push" => can.push = true,
                _ => {
                    let why = format!("{name:?} is none of pull, resolve and push");
                    return Err(self.wrong("capabilities", why));
                }
            }
        }
        Ok(Some(can))
    }

    fn boolean(&self, field: &str) -> Result<bool, ImageError> {
        match self.table.get(field) {
            None => Ok(false),
            Some(item) => item
                .as_bool()
                .ok_or_else(|| self.wrong(field, "it is not true or false")),
        }
    }

    /// A string, or a list of them.
    fn strings(&self, field: &str) -> Result<Vec<String>, ImageError> {
        let Some(item) = self.table.get(field) else {
            return Ok(Vec::new());
        };
        strings(item).ok_or_else(|| self.wrong(field, "it is no string or list of strings"))
    }

    /// One file with certificate and key; or a list of such, or of pairs.
    fn client(&self) -> Result<Option<(PathBuf, Vec<u8>)>, ImageError> {
        let Some(item) = self.table.get("client") else {
            return Ok(None);
        };
        let why = "it is no file, list of files, or list of pairs of files";
        let error = || self.wrong("client", why);
        let first = match item.as_array() {
            None => vec![item.as_str().ok_or_else(error)?.to_owned()],
            Some(all) => {
                if all.len() > 1 {
                    let (path, field) = (self.path, self.name("client"));
                    tracing::warn!(?path, field, "the first client certificate is used only");
                }
                match all.get(0) {
                    None => return Ok(None),
                    Some(first) => match (first.as_str(), first.as_array()) {
                        (Some(file), _) => vec![file.to_owned()],
                        (None, Some(pair)) => {
                            let pair = pair.iter().map(|one| one.as_str().map(str::to_owned));
                            pair.collect::<Option<Vec<_>>>().ok_or_else(error)?
                        }
                        (None, None) => return Err(error()),
                    },
                }
            }
        };
        let name = self.name("client");
        let paths: Vec<_> = first.iter().map(|file| self.beside(file)).collect();
        let key = |key: &PathBuf| !key.as_os_str().is_empty() && !first[1].is_empty();
        match &paths[..] {
            [both] => client(self.path, &name, both, None).map(Some),
            [certificate, other] => {
                let other = key(other).then_some(other.as_path());
                client(self.path, &name, certificate, other).map(Some)
            }
            _ => Err(error()),
        }
    }

    fn headers(&self) -> Result<Vec<(HeaderName, HeaderValue)>, ImageError> {
        let Some(item) = self.table.get("header") else {
            return Ok(Vec::new());
        };
        let table = item
            .as_table_like()
            .ok_or_else(|| self.wrong("header", "it is no table"))?;
        let mut headers = Vec::new();
        for (name, item) in table.iter() {
            let field = format!("header.{name}");
            let values = strings(item)
                .ok_or_else(|| self.wrong(&field, "it is no string or list of strings"))?;
            let name = HeaderName::from_bytes(name.as_bytes())
                .map_err(|_| self.wrong(&field, "this is no name of a header"))?;
            for value in values {
                // What it is stays untold: it may be a password.
                let value = HeaderValue::from_str(&value);
                let mut value = value
                    .map_err(|_| self.wrong(&field, "it has characters that no header has"))?;
                value.set_sensitive(true);
                headers.push((name.clone(), value));
            }
        }
        Ok(headers)
    }
}

fn strings(item: &Item) -> Option<Vec<String>> {
    if let Some(text) = item.as_str() {
        return Some(vec![text.to_owned()]);
    }
    let all = item.as_array()?.iter();
    all.map(|one| one.as_str().map(str::to_owned)).collect()
}

/// A time as Go writes it: numbers with units.
fn duration(text: &str) -> Option<Duration> {
    let mut sum = Duration::ZERO;
    let mut rest = text;
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit() && c != '.')?;
        let number: f64 = rest[..digits].parse().ok()?;
        rest = &rest[digits..];
        let unit = rest
            .find(|c: char| c.is_ascii_digit())
            .unwrap_or(rest.len());
        let seconds = match &rest[..unit] {
            "ms" => 0.001,
            "s" => 1.0,
            "m" => 60.0,
            "h" => 3600.0,
            _ => return None,
        };
        sum += Duration::try_from_secs_f64(number * seconds).ok()?;
        rest = &rest[unit..];
    }
    (!sum.is_zero()).then_some(sum)
}

#[cfg(test)]
mod tests {
    use super::super::hosts::hosts;
    use super::*;
    use std::fs;

    fn hosts_of(text: &str, registry: &str) -> Result<Vec<Host>, ImageError> {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join(registry);
        fs::create_dir(&path).unwrap();
        fs::write(path.join("hosts.toml"), text).unwrap();
        hosts(registry, Some(directory.path()), false)
    }

    fn addresses(text: &str, registry: &str) -> Vec<String> {
        let hosts = hosts_of(text, registry).unwrap();
        hosts.iter().map(|host| host.base.to_string()).collect()
    }

    #[test]
    fn hosts_are_asked_in_the_files_order_and_the_server_last() {
        let text = r#"
            server = "https://upstream.example/some"
            [host."http://z.example:5000"]
            [host."a.example/v2"]
            [host."https://b.example/as/is"]
              override_path = true
            "#;
        assert_eq!(
            addresses(text, "registry.example"),
            [
                "http://z.example:5000/v2/",
                "https://a.example/v2/",
                "https://b.example/as/is/",
                "https://upstream.example/some/v2/",
            ],
        );
        // Without `server` the registry itself.
        assert_eq!(
            addresses("", "docker.io"),
            ["https://registry-1.docker.io/v2/"]
        );
        assert_eq!(addresses("skip_verify = true", "r"), ["https://r/v2/"]);
    }

    #[test]
    fn every_field_is_read() {
        let text = r#"
            capabilities = ["pull"]
            [host."https://m"]
              capabilities = ["pull", "Resolve"]
              skip_verify = true
              dial_timeout = "1m30.5s"
              [host."https://m".header]
                x-one = "1"
                X-Two = ["2", "3"]
            "#;
        let hosts = hosts_of(text, "r").unwrap();
        let [mirror, itself] = &hosts[..] else {
            panic!("{hosts:?}");
        };
        let can = |pull, resolve, push| Capabilities {
            pull,
            resolve,
            push,
        };
        assert_eq!((mirror.can, mirror.itself), (can(true, true, false), false));
        assert_eq!((itself.can, itself.itself), (can(true, false, false), true));
        assert!(mirror.skip_verify && !itself.skip_verify);
        assert_eq!(mirror.dial_timeout, Some(Duration::from_millis(90_500)));
        let headers = mirror.headers.iter();
        let headers: Vec<_> = headers.map(|(n, v)| (n.as_str(), v.as_bytes())).collect();
        assert_eq!(
            headers,
            [("x-one", &b"1"[..]), ("x-two", b"2"), ("x-two", b"3")],
        );
        assert!(!format!("{mirror:?}").contains("\"1\""));
    }

    #[test]
    fn what_is_wrong_is_named_with_its_file_and_field() {
        for (text, field) in [
            ("server = 1", "server"),
            ("server = \"ftp://x\"", "server"),
            ("host = 1", "host"),
            ("[host.\"http://\"]", "host.\"http://\""),
            ("capabilities = [\"fetch\"]", "capabilities"),
            ("skip_verify = \"yes\"", "skip_verify"),
            ("[host.\"m\"]\nca = \"absent.pem\"", "host.\"m\".ca"),
            ("[host.\"m\"]\nca = 1", "host.\"m\".ca"),
            ("client = [[\"a\", \"b\", \"c\"]]", "client"),
            ("client = \"absent.pem\"", "client"),
            ("dial_timeout = \"fast\"", "dial_timeout"),
            ("[header]\n\"a b\" = \"x\"", "header.a b"),
            ("[header]\nx = 1", "header.x"),
        ] {
            let error = hosts_of(text, "r").unwrap_err();
            let ImageError::Hosts { field: found, .. } = &error else {
                panic!("{error}");
            };
            assert_eq!(found, field, "{error}");
            assert!(error.to_string().contains("hosts.toml"), "{error}");
        }
        let error = hosts_of("server = ", "r").unwrap_err().to_string();
        assert!(error.contains("line 1"), "{error}");
        let error = hosts_of("server = \"https://user:word@h\"", "r")
            .unwrap_err()
            .to_string();
        assert!(!error.contains("word"), "{error}");
    }

    #[test]
    fn the_most_special_directory_counts() {
        let directory = tempfile::tempdir().unwrap();
        let base = |registry: &str| {
            let hosts = hosts(registry, Some(directory.path()), true).unwrap();
            hosts[0].base.to_string()
        };
        assert_eq!(base("h:5000"), "http://h:5000/v2/");
        for (name, registry) in [
            ("_default", "other"),
            ("h:5000", "h:5000"),
            ("h_5000_", "h:5000"),
        ] {
            let path = directory.path().join(name);
            fs::create_dir(&path).unwrap();
            let text = format!(
                "[host.\"https://{}.example\"]",
                name.replace([':', '_'], "-")
            );
            fs::write(path.join("hosts.toml"), text).unwrap();
            let expected = format!("https://{}.example/v2/", name.replace([':', '_'], "-"));
            assert_eq!(base(registry), expected);
        }
        assert!(hosts("h", Some(Path::new("/nonexistent")), false).is_err());
    }
}
