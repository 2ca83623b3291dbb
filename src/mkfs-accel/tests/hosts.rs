//! Registries that are reached in special ways: what `hosts.toml` says, docker's
//! certificates, proxies. Real registries, a self-made authority, real proxies.

mod common;

use common::network::{Authority, ForwardProxy, HangsUp};
use common::services::{Access, Harm, Proxy, Registry, push};
use common::{Image, Ufs, mkfs_accel, sample_tar};
use std::fs;
use std::path::Path;
use std::process::Command;
use tempfile::TempDir;

/// A directory of `hosts.toml` files with one for `registry`.
fn hosts(registry: &str, text: &str) -> TempDir {
    let directory = TempDir::new().unwrap();
    let path = directory.path().join(registry);
    fs::create_dir(&path).unwrap();
    fs::write(path.join("hosts.toml"), text).unwrap();
    directory
}

/// Converts `source`; `set_up` changes the command. Gives what it wrote to standard
/// error, and whether it went well.
fn try_convert(source: &str, hosts: &Path, set_up: impl Fn(&mut Command)) -> (bool, String) {
    let ufs = Ufs::new();
    let mut command = mkfs_accel();
    command.args(["convert", source, "--ufs"]).arg(ufs.path());
    command.arg("--hosts-dir").arg(hosts);
    set_up(&mut command);
    let output = command.output().unwrap();
    let error = String::from_utf8(output.stderr).unwrap();
    let good = output.status.success();
    assert!(good || common::failed(output.status), "{error}");
    assert!(good || ufs.is_empty());
    (good, error)
}

#[track_caller]
fn good(source: &str, hosts: &TempDir) {
    let (good, error) = try_convert(source, hosts.path(), |_| {});
    assert!(good, "{error}");
}

#[track_caller]
fn bad(source: &str, hosts: &TempDir) -> String {
    let (good, error) = try_convert(source, hosts.path(), |_| {});
    assert!(!good);
    error
}

fn pushed_to(registry: &Registry, image: &Image) {
    push(&image.source(), &registry.image("x"), &[]);
}

/// A registry with an image "x" whose certificate is of `authority`.
fn tls_registry(authority: &Authority, image: &Image) -> Registry {
    let registry = Registry::start(&Access::Tls(authority.sign("IP:127.0.0.1")));
    pushed_to(&registry, image);
    registry
}

#[test]
fn authorities_of_ones_own() {
    let authority = Authority::new();
    let registry = tls_registry(&authority, &Image::gzipped(&[sample_tar(1)]));
    let (name, image) = (&registry.address, registry.image("x"));

    let error = bad(&image, &hosts(name, ""));
    assert!(error.contains("\"ca\" in hosts.toml"), "{error}");
    let ca = authority.certificate();
    good(&image, &hosts(name, &format!("ca = {ca:?}")));
    good(
        &image,
        &hosts(name, &format!("server = \"https://{name}\"\nca = [{ca:?}]")),
    );
    good(&image, &hosts(name, "skip_verify = true"));
    good(&image, &hosts("_default", &format!("ca = {ca:?}")));
    good(
        &image,
        &hosts(
            &format!("{}_", name.replace(':', "_")),
            &format!("ca = {ca:?}"),
        ),
    );
    // From the file on.
    let relative = hosts(name, "ca = \"own.pem\"");
    fs::copy(&ca, relative.path().join(name).join("own.pem")).unwrap();
    good(&image, &relative);
    // As docker has them.
    let docker = hosts(name, "");
    fs::remove_file(docker.path().join(name).join("hosts.toml")).unwrap();
    fs::copy(&ca, docker.path().join(name).join("own.crt")).unwrap();
    good(&image, &docker);

    let other = Authority::new();
    let text = format!("ca = {:?}", other.certificate());
    let error = bad(&image, &hosts(name, &text));
    assert!(error.contains("certificate"), "{error}");
    let error = bad(&image, &hosts(name, "ca = \"absent.pem\""));
    for part in ["hosts.toml", ", ca: ", "absent.pem", "No such file"] {
        assert!(error.contains(part), "{part:?}: {error}");
    }
}

#[test]
fn certificates_of_clients() {
    let authority = Authority::new();
    let access = Access::Clients(authority.sign("IP:127.0.0.1"), authority.certificate());
    let registry = Registry::start(&access);
    let (name, image) = (&registry.address, registry.image("x"));
    let client = authority.sign("DNS:client");
    let (ca, certificate, key) = (authority.certificate(), client.certificate(), client.key());
    let docker = hosts(name, "");
    let directory = docker.path().join(name);
    fs::remove_file(directory.join("hosts.toml")).unwrap();
    for (from, to) in [(&ca, "a.crt"), (&certificate, "a.cert"), (&key, "a.key")] {
        fs::copy(from, directory.join(to)).unwrap();
    }
    let copy = ["--dest-cert-dir", directory.to_str().unwrap()];
    let source = Image::gzipped(&[sample_tar(1)]);
    push(&source.source(), &image, &copy);

    let error = bad(&image, &hosts(name, &format!("ca = {ca:?}")));
    assert!(error.contains("\"client\" in hosts.toml"), "{error}");
    // Where the alert that says so is lost.
    let other = HangsUp::start(&authority.sign("IP:127.0.0.1"));
    let plain = hosts(&other.address, &format!("ca = {ca:?}"));
    let error = bad(&format!("docker://{}/x", other.address), &plain);
    assert!(error.contains("\"client\" in hosts.toml"), "{error}");
    good(&image, &docker);
    let pair = format!("ca = {ca:?}\nclient = [[{certificate:?}, {key:?}]]");
    good(&image, &hosts(name, &pair));
    let both = directory.join("both.pem");
    let text = fs::read_to_string(&certificate).unwrap() + &fs::read_to_string(&key).unwrap();
    fs::write(&both, text).unwrap();
    good(
        &image,
        &hosts(name, &format!("ca = {ca:?}\nclient = {both:?}")),
    );
    let error = bad(&image, &hosts(name, &format!("client = {certificate:?}")));
    assert!(
        error.contains(", client: ") && error.contains("no key"),
        "{error}"
    );
}

#[test]
fn mirrors_are_asked_first_and_the_registry_when_they_fail() {
    let image = Image::gzipped(&[sample_tar(1)]);
    let (full, empty) = (
        Registry::start(&Access::Open),
        Registry::start(&Access::Open),
    );
    pushed_to(&full, &image);
    let watched = Proxy::watching(&full);
    let gone = "docker://registry.invalid/x";
    let mirror = format!("http://{}", watched.address);

    // The registry itself need not be there.
    good(
        gone,
        &hosts("registry.invalid", &format!("[host.{mirror:?}]")),
    );
    assert!(watched.count("/v2/x/manifests/latest?ns=registry.invalid") > 0);
    assert_eq!(watched.count(&image.layer(0)), 1);

    // One that does not have it, one that is not there, one that is of another kind.
    let broken = Proxy::start(&full, "/v2/", Harm::Refuse(99, "405 Method Not Allowed"));
    let text = format!(
        "[host.\"http://{}\"]\n[host.\"http://127.0.0.1:9\"]\n[host.\"http://{}\"]\n[host.{mirror:?}]",
        empty.address, broken.address,
    );
    good(gone, &hosts("registry.invalid", &text));

    // All of them fail: each says why.
    let text = format!(
        "[host.\"http://{}\"]\n[host.\"http://127.0.0.1:9\"]",
        empty.address
    );
    let error = bad(gone, &hosts("registry.invalid", &text));
    for part in [
        "from registry.invalid",
        "before that",
        &empty.address,
        "404",
        "127.0.0.1:9",
    ] {
        assert!(error.contains(part), "{part:?}: {error}");
    }
}

#[test]
fn a_mirror_that_breaks_off_is_replaced_within_a_layer() {
    let image = Image::gzipped(&[sample_tar(1)]);
    let full = Registry::start(&Access::Open);
    pushed_to(&full, &image);
    let cut = Proxy::start(&full, &image.layer(0), Harm::CutBody);
    let text = format!(
        "server = \"http://{}\"\n[host.\"http://{}\"]",
        full.address, cut.address
    );
    good(
        "docker://registry.invalid/x",
        &hosts("registry.invalid", &text),
    );
    assert!(cut.count(&image.layer(0)) > 1, "{:?}", cut.requests);
}

#[test]
fn capabilities_say_who_is_asked_for_what() {
    let image = Image::gzipped(&[sample_tar(1)]);
    let (full, target) = (
        Registry::start(&Access::Open),
        Registry::start(&Access::Open),
    );
    pushed_to(&full, &image);
    let (server, mirror) = (Proxy::watching(&full), Proxy::watching(&full));
    let text = format!(
        "server = \"http://{}\"\n[host.\"http://{}\"]\ncapabilities = [\"pull\"]",
        server.address, mirror.address,
    );
    good(
        "docker://registry.invalid/x",
        &hosts("registry.invalid", &text),
    );
    // The tag by the server, what it leads to by the mirror.
    assert_eq!(server.count("manifests/latest"), 1);
    assert_eq!(mirror.count("manifests/"), 0);
    assert_eq!(server.count("/blobs/"), 0);
    assert_eq!(mirror.count(&image.layer(0)), 1);

    let nobody = "capabilities = [\"push\"]";
    let error = bad(
        "docker://registry.invalid/x",
        &hosts("registry.invalid", nobody),
    );
    assert!(error.contains("no host with the capability"), "{error}");

    // Pushed to the first that takes it.
    let text = format!(
        "server = \"http://{0}\"\ncapabilities = [\"pull\"]\n[host.\"http://{0}\"]\ncapabilities = [\"pull\", \"resolve\"]\n[host.\"http://{1}\"]\ncapabilities = [\"push\"]",
        full.address, target.address,
    );
    let pushing = |command: &mut Command| {
        command.args(["--push", "docker://registry.invalid/y:acc"]);
    };
    let directory = hosts("registry.invalid", &text);
    let (pushed, error) = try_convert("docker://registry.invalid/x", directory.path(), pushing);
    assert!(pushed, "{error}");
    let made = format!("docker://{}/y:acc", target.address);
    common::services::tool("skopeo", &["inspect", "--tls-verify=false", &made]);
    let text = format!(
        "server = \"http://{}\"\ncapabilities = [\"pull\", \"resolve\"]",
        full.address
    );
    let directory = hosts("registry.invalid", &text);
    let (pushed, error) = try_convert("docker://registry.invalid/x", directory.path(), pushing);
    assert!(!pushed && error.contains("capability \"push\""), "{error}");
}

#[test]
fn paths_and_headers() {
    let image = Image::gzipped(&[sample_tar(1)]);
    let below = Registry::start(&Access::Below);
    let watched = Proxy::watching(&below);
    // skopeo knows no paths: a plain registry takes the image, this one gets its files.
    let plain = Registry::start(&Access::Open);
    pushed_to(&plain, &image);
    let (from, to) = (plain.data(), below.data());
    let from = format!("{}/.", from.display());
    let copy = ["-a", &from, to.to_str().unwrap()];
    fs::create_dir_all(&to).unwrap();
    common::services::tool("cp", &copy);
    let header = "[host.header]\nX-Secret = [\"opensesame\"]";
    let address = format!("http://{}/as/is", watched.address);
    let header = header.replace("host.", &format!("host.{address:?}."));
    let text = format!("[host.{address:?}]\n{header}");
    let directory = hosts("registry.invalid", &text);
    let (converted, error) =
        try_convert("docker://registry.invalid/x", directory.path(), |command| {
            command.env("RUST_LOG", "trace");
        });
    assert!(converted, "{error}");
    assert!(!error.contains("opensesame"));
    assert!(
        watched.count("GET /as/is/v2/x/") > 0,
        "{:?}",
        watched.requests
    );
    let headers = watched.headers.lock().unwrap().clone();
    let sent = |headers: &String| {
        headers
            .to_ascii_lowercase()
            .contains("x-secret: opensesame")
    };
    assert!(headers.iter().all(sent), "{headers:?}");
    let whole = format!("{address}/v2");
    good(
        "docker://registry.invalid/x",
        &hosts(
            "registry.invalid",
            &format!("[host.{whole:?}]\noverride_path = true"),
        ),
    );
}

/// "user:word" for the proxy.
const LOGIN: &str = "dXNlcjp3b3Jk";

#[test]
fn proxies_of_the_usual_variables() {
    let authority = Authority::new();
    let certificate = authority.sign("DNS:registry.invalid,IP:127.0.0.1");
    let registry = Registry::start(&Access::Tls(certificate));
    pushed_to(&registry, &Image::gzipped(&[sample_tar(1)]));
    let proxy = ForwardProxy::start(&registry.address, Some(LOGIN));
    let ca = format!("ca = {:?}", authority.certificate());
    let directory = hosts("_default", &ca);
    let through = |source: &str, variables: &[(&str, &str)]| {
        try_convert(source, directory.path(), |command| {
            command
                .envs(variables.iter().copied())
                .env("RUST_LOG", "trace");
        })
    };
    // A name that only the proxy knows.
    let named = "docker://registry.invalid/x";
    let known = format!("http://user:word@{}", proxy.address);
    for variable in ["HTTPS_PROXY", "https_proxy", "ALL_PROXY"] {
        let before = proxy.count();
        let (good, error) = through(named, &[(variable, &known)]);
        assert!(good, "{error}");
        assert!(proxy.count() > before, "{variable}");
        assert!(!error.contains("word") && !error.contains(LOGIN), "{error}");
    }
    let requests = proxy.requests.lock().unwrap().clone();
    assert!(
        requests
            .iter()
            .all(|line| line == "CONNECT registry.invalid:443 HTTP/1.1")
    );

    // Not for those that need none.
    let (good, error) = through(
        &registry.image("x"),
        &[
            ("HTTPS_PROXY", &known),
            ("NO_PROXY", "10.0.0.0/8,127.0.0.1"),
        ],
    );
    assert!(good, "{error}");
    assert_eq!(proxy.count(), requests.len());

    let wrong = format!("http://user:wrong-word@{}", proxy.address);
    let (good, error) = through(named, &[("HTTPS_PROXY", &wrong)]);
    assert!(
        !good && error.contains("the proxy wants a login"),
        "{error}"
    );
    assert!(
        !error.contains("wrong-word") && !error.contains("dXNlcjp3cm9uZy13b3Jk"),
        "{error}"
    );
    let (good, error) = through(named, &[("HTTPS_PROXY", "http://127.0.0.1:9")]);
    assert!(!good && error.contains("NO_PROXY"), "{error}");
}

#[test]
fn proxies_for_plain_http() {
    let registry = Registry::start(&Access::Open);
    pushed_to(&registry, &Image::gzipped(&[sample_tar(1)]));
    let proxy = ForwardProxy::start(&registry.address, Some(LOGIN));
    let directory = hosts("_default", "");
    let through = |login: &str| {
        try_convert("docker://registry.invalid/x", directory.path(), |command| {
            let address = format!("http://{login}{}", proxy.address);
            command.arg("--plain-http").env("http_proxy", address);
        })
    };
    let (good, error) = through("user:word@");
    assert!(good, "{error}");
    let requests = proxy.requests.lock().unwrap().clone();
    assert!(
        requests
            .iter()
            .all(|line| line.starts_with("GET http://registry.invalid/v2/"))
    );
    let (good, error) = through("");
    assert!(
        !good && error.contains("407") && error.contains("HTTP_PROXY"),
        "{error}"
    );
}

/// With everything that can be logged.
#[test]
fn no_credential_is_ever_shown() {
    let authority = Authority::new();
    let registry = Registry::start(&Access::PasswordTls(authority.sign("IP:127.0.0.1")));
    let image = registry.image("x");
    let source = Image::gzipped(&[sample_tar(1)]);
    push(&source.source(), &image, &["--dest-creds", "user:s3kr1t"]);
    let directory = hosts(
        &registry.address,
        &format!("ca = {:?}", authority.certificate()),
    );
    let file = directory.path().join("password");
    for (password, well) in [("s3kr1t", true), ("guessed", false)] {
        fs::write(&file, password).unwrap();
        let (good, error) = try_convert(&image, directory.path(), |command| {
            command
                .env("RUST_LOG", "trace")
                .args(["--username", "user", "--password-file"]);
            command
                .arg(&file)
                .args(["--push", &registry.image("y:acc")]);
        });
        assert_eq!(good, well, "{error}");
        // The password, and it behind "user:" in base64.
        for told in [password, "dXNlcjpzM2tyMXQ", "dXNlcjpndWVzc2Vk"] {
            assert!(!error.contains(told), "{told}");
        }
    }
    // A mirror is not told what was meant for the registry.
    let mirror = Registry::start(&Access::Open);
    push(&source.source(), &mirror.image("x"), &[]);
    let watched = Proxy::watching(&mirror);
    let refusing = Proxy::start(
        &mirror,
        "/v2/",
        Harm::Refuse(
            99,
            "401 Unauthorized\r\nWWW-Authenticate: Basic realm=\"x\"",
        ),
    );
    fs::write(&file, "s3kr1t").unwrap();
    let text = format!(
        "[host.\"http://{}\"]\n[host.\"http://{}\"]",
        refusing.address, watched.address
    );
    let mirrors = hosts("registry.invalid", &text);
    let (good, error) = try_convert("docker://registry.invalid/x", mirrors.path(), |command| {
        command
            .args(["--username", "user", "--password-file"])
            .arg(&file);
    });
    assert!(good, "{error}");
    for proxy in [&watched, &refusing] {
        let headers = proxy.headers.lock().unwrap().concat().to_ascii_lowercase();
        assert!(
            !headers.is_empty() && !headers.contains("authorization"),
            "{headers}"
        );
    }
}
