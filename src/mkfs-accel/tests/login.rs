//! What is said of registries that do not let us: before any work is done, by kind, and
//! without the password.

mod common;

use common::services::{Access, Harm, Proxy, Registry, TokenServer, push};
use common::{Image, Ufs, mkfs_accel, sample_tar};
use serde_json::{Value, json};
use std::fs;
use std::io::{BufRead as _, BufReader, Write as _};
use std::net::TcpListener;
use std::path::PathBuf;
use std::process::Output;
use tempfile::TempDir;

/// base64 of "user:s3kr1t", and of "user:n0tth4t".
const RIGHT: &str = "dXNlcjpzM2tyMXQ=";
const WRONG: &str = "dXNlcjpuMHR0aDR0";

/// A file of logins.
struct Logins(TempDir);

impl Logins {
    fn new(all: &[(&str, &str)]) -> Self {
        let directory = TempDir::new().unwrap();
        let auths = all
            .iter()
            .map(|(registry, auth)| ((*registry).to_owned(), json!({"auth": auth})));
        let auths: serde_json::Map<_, _> = auths.collect();
        let text = json!({"auths": auths}).to_string();
        fs::write(directory.path().join("config.json"), text).unwrap();
        Self(directory)
    }

    fn path(&self) -> PathBuf {
        self.0.path().join("config.json")
    }
}

/// All that it said has no password in it, in whatever form.
fn without_passwords(output: &Output) {
    for said in [&output.stdout, &output.stderr] {
        let said = String::from_utf8_lossy(said);
        for secret in ["s3kr1t", "n0tth4t", RIGHT, WRONG] {
            assert!(!said.contains(secret), "{said}");
        }
    }
}

/// The kind of refusal that the lines tell.
fn refused(output: &Output) -> Option<Value> {
    let said = String::from_utf8_lossy(&output.stdout);
    let lines = said
        .lines()
        .filter_map(|line| serde_json::from_str(line).ok());
    lines
        .map(|line: Value| line["refused"].clone())
        .find(|refused| !refused.is_null())
}

fn check(arguments: &[&str], logins: &Logins) -> Output {
    let output = mkfs_accel()
        .env("RUST_LOG", "trace")
        .args(["check", "--json", "--registry-config"])
        .arg(logins.path())
        .args(arguments)
        .output()
        .unwrap();
    without_passwords(&output);
    output
}

#[test]
fn a_login_is_checked_before_anything_is_wanted() {
    let password = Registry::start(&Access::Password);
    let tokens = Access::Token(TokenServer::start());
    let token = Registry::start(&tokens);
    let open = Registry::start(&Access::Open);
    let http = ["--plain-http"];
    let good = Logins::new(&[(&password.address, RIGHT), (&token.address, RIGHT)]);
    let output = check(&[&http[..], &[open.address.as_str()]].concat(), &good);
    assert!(output.status.success(), "{output:?}");
    let said: Value = serde_json::from_slice(&output.stdout).unwrap();
    let mut all = [&password.address, &token.address, &open.address];
    all.sort();
    assert_eq!(said, json!({"checked": all}));

    for registry in [&password, &token] {
        let bad = Logins::new(&[(&registry.address, WRONG)]);
        let output = check(&http, &bad);
        assert_eq!(output.status.code(), Some(4), "{output:?}");
        let expected = json!({"registry": registry.address, "problem": "Unauthorized"});
        assert_eq!(refused(&output), Some(expected));
        assert!(String::from_utf8_lossy(&output.stderr).contains("credentials"));
        // The file has none for it.
        let none = Logins::new(&[(&open.address, RIGHT)]);
        let output = check(&[&http[..], &[registry.address.as_str()]].concat(), &none);
        assert_eq!(refused(&output).unwrap()["problem"], "NoLogin");
        let error = String::from_utf8_lossy(&output.stderr);
        assert!(error.contains("has none for it"), "{error}");
    }
    // It is not there, and nobody answers.
    let absent = Logins::new(&[]);
    fs::remove_file(absent.path()).unwrap();
    assert_eq!(
        refused(&check(&http, &absent)).unwrap()["problem"],
        "NoLoginFile"
    );
    let gone = Logins::new(&[("127.0.0.1:1", RIGHT)]);
    assert_eq!(
        refused(&check(&http, &gone)).unwrap()["problem"],
        "Unreachable"
    );
    // Of several the first is told by kind, and the other in words.
    let two = Logins::new(&[("127.0.0.1:1", RIGHT), ("127.0.0.1:2", RIGHT)]);
    let output = check(&http, &two);
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(
        error.contains("127.0.0.1:1") && error.contains("127.0.0.1:2"),
        "{error}"
    );
    // A file without logins, and no registry.
    let empty = Logins::new(&[]);
    let output = check(&http, &empty);
    assert_eq!((output.status.code(), refused(&output)), (Some(1), None));
}

#[test]
fn a_conversion_tells_which_registry_does_not_let_it_before_it_begins() {
    let image = Image::gzipped(&[sample_tar(1)]);
    let source = Registry::start(&Access::Open);
    push(&image.source(), &source.image("team/app:v1"), &[]);
    let target = Registry::start(&Access::Password);
    let ufs = Ufs::new();
    let convert = |from: &str, to: &str, logins: &Logins| {
        let output = mkfs_accel()
            .env("RUST_LOG", "trace")
            .args([
                "convert",
                from,
                "--plain-http",
                "--json-lines",
                "--push",
                to,
            ])
            .arg("--registry-config")
            .arg(logins.path())
            .arg("--ufs")
            .arg(ufs.path())
            .output()
            .unwrap();
        without_passwords(&output);
        output
    };
    let to = target.image("team/app:v1-acc");
    let from = source.image("team/app:v1");
    let (good, bad) = (
        Logins::new(&[(&target.address, RIGHT)]),
        Logins::new(&[(&target.address, WRONG)]),
    );
    let none = Logins::new(&[]);
    let absent = Logins::new(&[]);
    fs::remove_file(absent.path()).unwrap();
    let missing = source.image("team/missing:v1");
    // It takes the login, and no uploads.
    let manifests = "/v2/team/app/manifests";
    let uploads = "/v2/team/app/blobs/uploads";
    let no_pull = Proxy::start(
        &source,
        manifests,
        Harm::Refuse(usize::MAX, "403 Forbidden"),
    );
    let no_push = Proxy::start(&target, uploads, Harm::Refuse(usize::MAX, "403 Forbidden"));
    let of_proxies = Logins::new(&[(&no_pull.address, RIGHT), (&no_push.address, RIGHT)]);
    let (no_pull, no_push) = (
        no_pull.image("team/app:v1"),
        no_push.image("team/app:v1-acc"),
    );
    // It makes no repositories.
    let bare = Proxy::start(&target, uploads, Harm::Refuse(usize::MAX, "404 Not Found"));
    let of_bare = Logins::new(&[(&bare.address, RIGHT)]);
    let bare = bare.image("team/app:v1-acc");
    let nobody = "docker://127.0.0.1:1/team/app:v1";
    for (from, to, logins, problem, registry) in [
        (&from, &to, &bad, "Unauthorized", &to),
        (&from, &to, &none, "NoLogin", &to),
        (&from, &to, &absent, "NoLoginFile", &to),
        (&from, &no_push, &of_proxies, "Forbidden", &no_push),
        (&no_pull, &to, &of_proxies, "Forbidden", &no_pull),
        (&missing, &to, &good, "NotFound", &missing),
        (&from, &bare, &of_bare, "NoTarget", &bare),
        (
            &nobody.to_owned(),
            &to,
            &good,
            "Unreachable",
            &nobody.to_owned(),
        ),
    ] {
        let output = convert(from, to, logins);
        assert_eq!(output.status.code(), Some(4), "{output:?}");
        let refused = refused(&output).unwrap();
        assert_eq!(refused["problem"], problem, "{output:?}");
        let host = registry.trim_start_matches("docker://").split('/').next();
        assert_eq!(refused["registry"].as_str(), host);
        assert!(ufs.is_empty(), "nothing was begun");
    }
    let output = convert(&from, &to, &good);
    assert!(output.status.success(), "{output:?}");
    let said = String::from_utf8(output.stdout).unwrap();
    let first: Value = serde_json::from_str(said.lines().next().unwrap()).unwrap();
    assert_eq!(first, json!({"checked": {"source": from, "targets": [to]}}));
}

/// A token that the server below gives.
const TOKEN: &str = "t0k3n-f0r-0n3";

/// A registry that takes no login, and answers with what it was told, as some do that help with
/// debugging. `wants` is the way to log in; it is its own token server. Its address.
fn repeats(wants: &str) -> String {
    let server = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = server.local_addr().unwrap().to_string();
    let wants = wants.replace("{address}", &address);
    std::thread::spawn(move || {
        for mut client in server.incoming().flatten() {
            let (mut told, mut asked) = (String::new(), String::new());
            for line in BufReader::new(&client).lines().map_while(Result::ok) {
                if line.is_empty() {
                    break;
                }
                if asked.is_empty() {
                    asked.clone_from(&line);
                }
                if line.to_lowercase().starts_with("authorization") {
                    told = format!("told {line} s3kr1t");
                }
            }
            let mut head = format!("401 Unauthorized\r\nWWW-Authenticate: {wants}");
            if asked.contains("/token") {
                (head, told) = ("200 OK".to_owned(), json!({"token": TOKEN}).to_string());
            }
            let _ = write!(
                client,
                "HTTP/1.1 {head}\r\nConnection: close\r\nContent-Length: {}\r\n\r\n{told}",
                told.len()
            );
        }
    });
    address
}

#[test]
fn a_server_that_answers_with_what_it_was_told_is_not_repeated() {
    for (wants, told) in [
        ("Basic realm=\"x\"", "told authorization: basic …"),
        (
            "Bearer realm=\"http://{address}/token\",service=\"x\"",
            "told authorization: bearer …",
        ),
    ] {
        let address = repeats(wants);
        let logins = Logins::new(&[(&address, RIGHT)]);
        let output = check(&["--plain-http"], &logins);
        assert_eq!(refused(&output).unwrap()["problem"], "Unauthorized");
        let error = String::from_utf8_lossy(&output.stderr);
        assert!(error.to_lowercase().contains(told), "{error}");
        assert!(!error.contains(TOKEN), "{error}");
    }
}

#[test]
fn a_way_to_log_in_that_nobody_knows_is_not_the_fault_of_the_login() {
    for wants in [
        "Bearer service=\"x\"",
        "Bearer realm=\"nowhere\"",
        "Digest realm=\"x\"",
    ] {
        let address = repeats(wants);
        let output = check(&["--plain-http"], &Logins::new(&[(&address, RIGHT)]));
        assert_eq!(refused(&output).unwrap()["problem"], "Other", "{wants}");
        let error = String::from_utf8_lossy(&output.stderr);
        assert!(error.contains("not understood"), "{error}");
    }
}

#[test]
fn ufs_is_tried_before_registries_are_asked() {
    let ufs = Ufs::new();
    let try_out = |path: &std::path::Path| {
        let output = mkfs_accel()
            .args(["check", "--json", "127.0.0.1:1", "--plain-http", "--ufs"])
            .arg(path)
            .output()
            .unwrap();
        let line = output.stdout.split(|byte| *byte == b'\n').next().unwrap();
        let said: Value = serde_json::from_slice(line).unwrap();
        (output.status.code(), said["ufs"].clone())
    };
    // It is there, and the registry is not.
    let (code, said) = try_out(ufs.path());
    assert_eq!(said, json!({"usable": true, "error": null}));
    assert_eq!(code, Some(4));
    for directory in ["tmp", "leases"] {
        let left = fs::read_dir(ufs.path().join(directory)).unwrap().count();
        assert_eq!(left, 0, "{directory}");
    }
    fs::remove_dir(ufs.path().join("tmp")).unwrap();
    fs::write(ufs.path().join("tmp"), "").unwrap();
    let (code, said) = try_out(ufs.path());
    assert_eq!((code, &said["usable"]), (Some(5), &json!(false)));
    let error = said["error"].as_str().unwrap();
    assert!(error.contains("cannot create"), "{error}");
    assert_eq!(try_out(&ufs.path().join("nowhere")).0, Some(5));
}
