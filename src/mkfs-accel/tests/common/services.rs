//! The real services of the tests, from Debian's packages `docker-registry`,
//! `skopeo` and `umoci`; a proxy that does a registry harm; a token server.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;
use tempfile::TempDir;

/// A `docker-registry` on loopback; ends with the value.
pub struct Registry {
    child: Child,
    directory: TempDir,
    pub address: String,
}

/// How a registry lets users in.
pub enum Access {
    Open,
    /// To everybody, who may delete, too.
    Deleting,
    /// "user" with the password "s3kr1t".
    Password,
    /// Tokens of this server.
    Token(TokenServer),
    /// To everybody, over TLS with this certificate.
    Tls(Certificate),
    /// To whoever has a certificate of this authority, over TLS with this certificate.
    Clients(Certificate, String),
    /// "user" with the password "s3kr1t", over TLS with this certificate.
    PasswordTls(Certificate),
    /// To everybody, below the path `/as/is/`.
    Below,
    /// To everybody, but nothing can be pushed.
    ReadOnly(PathBuf),
}

/// A certificate for 127.0.0.1 that nobody has signed, and its key.
pub struct Certificate(TempDir);

impl Certificate {
    /// The place for one.
    pub fn empty() -> Self {
        Self(TempDir::new().unwrap())
    }

    pub fn new() -> Self {
        let certificate = Self::empty();
        let config = certificate.path("config");
        let text = "[req]\ndistinguished_name = name\nx509_extensions = x\n[name]\n\
             [x]\nbasicConstraints = critical,CA:FALSE\nsubjectAltName = IP:127.0.0.1\n";
        fs::write(&config, text).unwrap();
        let new = [
            "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2",
        ];
        let (key, out) = (certificate.key(), certificate.certificate());
        let files = [
            "-subj", "/CN=test", "-config", &config, "-keyout", &key, "-out", &out,
        ];
        tool("openssl", &[&new[..], &files].concat());
        certificate
    }

    fn path(&self, name: &str) -> String {
        self.0.path().join(name).to_str().unwrap().to_owned()
    }

    pub fn key(&self) -> String {
        self.path("key.pem")
    }

    pub fn certificate(&self) -> String {
        self.path("certificate.pem")
    }
}

/// "user" with the password "s3kr1t", which is part of no word that TLS or HTTP has, as
/// htpasswd(1) writes it with bcrypt.
const HTPASSWD: &str = "user:$2b$04$abcdefghijklmnopqrstuuQEso6pVgPcSsenWQGjAhI6QHESduL6m\n";

impl Registry {
    pub fn start(access: &Access) -> Self {
        let directory = TempDir::new().unwrap();
        let path = directory.path();
        // A port that is free now; nobody on this machine hands it out again at
        // once.
        let address = TcpListener::bind("127.0.0.1:0").unwrap().local_addr();
        let address = address.unwrap().to_string();
        let tls = match access {
            Access::Tls(certificate) | Access::PasswordTls(certificate) => format!(
                ", tls: {{certificate: {}, key: {}}}",
                certificate.certificate(),
                certificate.key(),
            ),
            Access::Clients(certificate, authority) => format!(
                ", tls: {{certificate: {}, key: {}, clientcas: ['{authority}']}}",
                certificate.certificate(),
                certificate.key(),
            ),
            Access::Below => ", prefix: /as/is/".to_owned(),
            _ => String::new(),
        };
        let data = match access {
            Access::ReadOnly(data) => data.clone(),
            _ => path.join("data"),
        };
        let mode = match access {
            Access::Deleting => ", delete: {enabled: true}",
            Access::ReadOnly(_) => ", maintenance: {readonly: {enabled: true}}",
            _ => "",
        };
        let mut config = format!(
            "version: 0.1\nlog: {{level: error}}\nhttp: {{addr: {address}{tls}}}\n\
             storage: {{filesystem: {{rootdirectory: {}}}{mode}}}\n\
             validation: {{manifests: {{urls: {{allow: [^http]}}}}}}\n",
            data.display(),
        );
        config += &match access {
            Access::Open
            | Access::Deleting
            | Access::Tls(_)
            | Access::Clients(..)
            | Access::Below
            | Access::ReadOnly(_) => String::new(),
            Access::Password | Access::PasswordTls(_) => {
                let users = path.join("htpasswd");
                fs::write(&users, HTPASSWD).unwrap();
                let users = users.display();
                format!("auth: {{htpasswd: {{realm: test, path: {users}}}}}\n")
            }
            Access::Token(server) => format!(
                "auth: {{token: {{realm: 'http://{}/token', service: test, issuer: test, rootcertbundle: {}}}}}\n",
                server.address,
                server.certificate.certificate(),
            ),
        };
        fs::write(path.join("config.yml"), config).unwrap();
        let child = Command::new("docker-registry")
            .arg("serve")
            .arg(path.join("config.yml"))
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("docker-registry is needed: apt-get install docker-registry skopeo umoci");
        let registry = Self {
            child,
            directory,
            address,
        };
        for _ in 0..600 {
            if TcpStream::connect(&registry.address).is_ok() {
                return registry;
            }
            thread::sleep(Duration::from_millis(50));
        }
        panic!("docker-registry does not answer on {}", registry.address);
    }

    pub fn image(&self, name: &str) -> String {
        format!("docker://{}/{name}", self.address)
    }

    /// Where it keeps everything.
    pub fn data(&self) -> PathBuf {
        self.directory.path().join("data")
    }

    /// Where it keeps a blob.
    pub fn blob(&self, digest: &str) -> PathBuf {
        let hex = digest.strip_prefix("sha256:").unwrap();
        let blobs = self
            .directory
            .path()
            .join("data/docker/registry/v2/blobs/sha256");
        blobs.join(&hex[..2]).join(hex).join("data")
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[track_caller]
pub fn tool(program: &str, arguments: &[&str]) {
    let output = Command::new(program)
        .args(arguments)
        .output()
        .unwrap_or_else(|error| panic!("{program}: {error}; apt-get install {program}"));
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {arguments:?}: {error}");
}

/// Copies an image from an OCI layout to a registry.
#[track_caller]
pub fn push(source: &str, destination: &str, more: &[&str]) {
    let fixed = ["--insecure-policy", "copy", "--dest-tls-verify=false"];
    tool("skopeo", &[&fixed, more, &[source, destination]].concat());
}

/// An image of two layers made by umoci at `layout`, tagged `v1`.
pub fn umoci_image(layout: &Path) {
    let layout = layout.to_str().unwrap();
    let image = format!("{layout}:v1");
    tool("umoci", &["init", "--layout", layout]);
    tool("umoci", &["new", "--image", &image]);
    let tree = TempDir::new().unwrap();
    let path = tree.path();
    fs::create_dir(path.join("bin")).unwrap();
    fs::write(path.join("bin/tool"), super::noise(1, 300_000)).unwrap();
    std::os::unix::fs::symlink("tool", path.join("bin/link")).unwrap();
    fs::hard_link(path.join("bin/tool"), path.join("bin/hard")).unwrap();
    let from = path.to_str().unwrap();
    tool("umoci", &["insert", "--image", &image, from, "/opt"]);
    fs::write(path.join("more"), super::noise(2, 70_000)).unwrap();
    tool("umoci", &["insert", "--image", &image, from, "/srv/deep"]);
    tool(
        "umoci",
        &[
            "config",
            "--image",
            &image,
            "--config.cmd",
            "/opt/bin/tool",
            "--config.env",
            "A=b",
        ],
    );
}

/// A proxy in front of a registry that does it harm. Ends with the test's process.
pub struct Proxy {
    pub address: String,
    /// The first line of every request.
    pub requests: Arc<Mutex<Vec<String>>>,
    /// The headers of every request.
    pub headers: Arc<Mutex<Vec<String>>>,
}

/// What it does to some requests.
#[derive(Clone)]
pub enum Harm {
    /// The connection ends after so many bytes of the answer.
    Cut(usize),
    /// The connection ends right behind the answer's head.
    CutBody,
    /// As [`Harm::Cut`], and the registry does not see which bytes are wanted; it ends so
    /// many behind those that the client has.
    CutWithoutRanges(usize),
    /// Nothing comes any more after so many bytes of the answer.
    Stall(usize),
    /// This many times there is this answer instead: status and headers.
    Refuse(usize, &'static str),
}

impl Proxy {
    /// Harms the requests whose first line, `METHOD PATH VERSION`, contains `path`.
    pub fn start(registry: &Registry, path: &str, harm: Harm) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let proxy = Self {
            address: listener.local_addr().unwrap().to_string(),
            requests: Arc::default(),
            headers: Arc::default(),
        };
        let (upstream, path) = (registry.address.clone(), path.to_owned());
        let (requests, all) = (Arc::clone(&proxy.requests), Arc::clone(&proxy.headers));
        thread::spawn(move || {
            for connection in listener.incoming().flatten() {
                let (upstream, path, harm) = (upstream.clone(), path.clone(), harm.clone());
                let (requests, all) = (Arc::clone(&requests), Arc::clone(&all));
                thread::spawn(move || relay(&connection, &upstream, &path, &harm, &requests, &all));
            }
        });
        proxy
    }

    /// A look at what goes to a registry, without any harm.
    pub fn watching(registry: &Registry) -> Self {
        Self::start(registry, "nothing", Harm::CutBody)
    }

    pub fn image(&self, name: &str) -> String {
        format!("docker://{}/{name}", self.address)
    }

    /// How many requests there were whose first line contains `part`.
    pub fn count(&self, part: &str) -> usize {
        let requests = self.requests.lock().unwrap();
        requests.iter().filter(|line| line.contains(part)).count()
    }
}

/// One request and its answer.
fn relay(
    mut client: &TcpStream,
    upstream: &str,
    path: &str,
    harm: &Harm,
    requests: &Mutex<Vec<String>>,
    all: &Mutex<Vec<String>>,
) -> Option<()> {
    let mut reader = BufReader::new(client);
    let (line, headers) = read_head(&mut reader)?;
    let mut body = vec![0; length(&headers)];
    reader.read_exact(&mut body).ok()?;
    all.lock().unwrap().push(headers.concat());
    let harmed = line.contains(path);
    let earlier = {
        let mut requests = requests.lock().unwrap();
        let earlier = requests.iter().filter(|line| line.contains(path)).count();
        requests.push(line.trim().to_owned());
        earlier
    };
    let mut from = 0;
    let mut head = line;
    for header in headers {
        let name = header.to_ascii_lowercase();
        if let Some(range) = name.strip_prefix("range: bytes=") {
            from = range.trim().trim_end_matches('-').parse().unwrap();
            if harmed && matches!(harm, Harm::CutWithoutRanges(_)) {
                continue;
            }
        }
        if !name.starts_with("connection:") {
            head += &header;
        }
    }
    head += "Connection: close\r\n\r\n";
    let most = match harm {
        _ if !harmed => usize::MAX,
        Harm::Cut(bytes) | Harm::Stall(bytes) => *bytes,
        Harm::CutWithoutRanges(bytes) => from + bytes,
        Harm::Refuse(times, answer) if earlier < *times => {
            let refusal =
                format!("HTTP/1.1 {answer}\r\nContent-Length: 2\r\nConnection: close\r\n\r\nno");
            return client.write_all(refusal.as_bytes()).ok();
        }
        Harm::Refuse(..) | Harm::CutBody => usize::MAX,
    };
    let mut server = TcpStream::connect(upstream).ok()?;
    server.write_all(head.as_bytes()).ok()?;
    server.write_all(&body).ok()?;
    if harmed && matches!(harm, Harm::CutBody) {
        let (line, headers) = read_head(&mut BufReader::new(&server))?;
        let head = line + &headers.concat() + "\r\n";
        return client.write_all(head.as_bytes()).ok();
    }
    std::io::copy(&mut server.take(most as u64), &mut client).ok()?;
    if harmed && matches!(harm, Harm::Stall(_)) {
        // Until the other side goes.
        let _ = client.read(&mut [0]);
    }
    Some(())
}

/// How many bytes follow a head.
fn length(headers: &[String]) -> usize {
    let mut all = headers.iter().filter_map(|header| header.split_once(':'));
    let found = all.find(|(name, _)| name.eq_ignore_ascii_case("content-length"));
    found.map_or(0, |(_, length)| length.trim().parse().unwrap())
}

/// A request's first line and its headers, each with its line's end.
fn read_head(reader: &mut impl BufRead) -> Option<(String, Vec<String>)> {
    let mut first = String::new();
    reader.read_line(&mut first).ok().filter(|n| *n > 0)?;
    let mut headers = Vec::new();
    loop {
        let mut line = String::new();
        reader.read_line(&mut line).ok()?;
        if line.trim().is_empty() {
            return Some((first, headers));
        }
        headers.push(line);
    }
}

/// A server of tokens for registries: for "user" with "s3kr1t", and for the identity
/// token "refresh". Ends with the test's process.
pub struct TokenServer {
    address: String,
    certificate: Certificate,
}

impl TokenServer {
    pub fn start() -> Self {
        let certificate = Certificate::new();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let (key, path) = (certificate.key(), certificate.certificate());
        thread::spawn(move || {
            for connection in listener.incoming().flatten() {
                answer_for_token(&connection, &key, &path);
            }
        });
        Self {
            address,
            certificate,
        }
    }
}

fn answer_for_token(mut client: &TcpStream, key: &str, certificate: &str) -> Option<()> {
    let mut reader = BufReader::new(client);
    let (line, headers) = read_head(&mut reader)?;
    let find = |name: &str| {
        let header = headers
            .iter()
            .find(|h| h.to_ascii_lowercase().starts_with(name));
        header.map(|header| header[name.len()..].trim().to_owned())
    };
    let length = find("content-length:").map_or(0, |length| length.parse().unwrap());
    let mut body = vec![0; length];
    reader.read_exact(&mut body).ok()?;
    let body = String::from_utf8(body).unwrap();
    let asked = match line.starts_with("POST") {
        true => &body,
        false => line.split(['?', ' ']).nth(2)?,
    };
    let parameter = |name: &str| {
        let all = asked.split('&').filter_map(|pair| pair.split_once('='));
        let mut values = all.filter(|(key, _)| *key == name).map(|(_, value)| value);
        values
            .next()
            .unwrap_or_default()
            .replace("%3A", ":")
            .replace("%2C", ",")
    };
    // "user:s3kr1t"
    let known = find("authorization:").as_deref() == Some("Basic dXNlcjpzM2tyMXQ=")
        || parameter("grant_type") == "refresh_token" && parameter("refresh_token") == "refresh";
    let (status, answer) = if known {
        let scope = parameter("scope");
        let parts: Vec<_> = scope.split(':').collect();
        let access = match parts[..] {
            [kind, name, actions] => serde_json::json!([{
                "type": kind, "name": name,
                "actions": actions.split(',').collect::<Vec<_>>(),
            }]),
            _ => serde_json::json!([]),
        };
        let token = sign(&access, key, certificate);
        // OAuth 2 has the one name, Docker's older way the other.
        let name = if line.starts_with("POST") {
            "access_token"
        } else {
            "token"
        };
        ("200 OK", serde_json::json!({name: token}))
    } else {
        (
            "401 Unauthorized",
            serde_json::json!({"errors": [{"code": "UNAUTHORIZED", "message": "who are you?"}]}),
        )
    };
    let answer = answer.to_string();
    let head = format!(
        "HTTP/1.1 {status}\r\nContent-Length: {}\r\nConnection: close\r\n\r\n",
        answer.len()
    );
    client.write_all((head + &answer).as_bytes()).ok()
}

/// A signed token (RFC 7519) that grants `access`.
fn sign(access: &serde_json::Value, key: &str, certificate: &str) -> String {
    let pem = fs::read_to_string(certificate).unwrap();
    let der: String = pem.lines().filter(|line| !line.starts_with('-')).collect();
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    let now = now.unwrap().as_secs();
    let header = serde_json::json!({"typ": "JWT", "alg": "RS256", "x5c": [der]});
    let claims = serde_json::json!({
        "iss": "test", "sub": "user", "aud": "test", "jti": "1", "access": access,
        "iat": now, "nbf": now - 60, "exp": now + 600,
    });
    let encode = |json: &serde_json::Value| base64url(json.to_string().as_bytes());
    let text = format!("{}.{}", encode(&header), encode(&claims));
    let mut openssl = Command::new("openssl")
        .args(["dgst", "-sha256", "-sign", key, "-binary"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    openssl
        .stdin
        .take()
        .unwrap()
        .write_all(text.as_bytes())
        .unwrap();
    let signature = openssl.wait_with_output().unwrap().stdout;
    format!("{text}.{}", base64url(&signature))
}

fn base64url(bytes: &[u8]) -> String {
    const DIGITS: &[u8] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";
    let mut text = String::new();
    for three in bytes.chunks(3) {
        let byte = |at: usize| usize::from(three.get(at).copied().unwrap_or(0));
        let bits = byte(0) << 16 | byte(1) << 8 | byte(2);
        for digit in 0..=three.len() {
            text.push(DIGITS[bits >> (18 - 6 * digit) & 63].into());
        }
    }
    text
}
