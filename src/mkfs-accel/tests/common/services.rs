//! The real services of the tests, from Debian's packages `docker-registry`,
//! `skopeo` and `umoci`, and a registry that stalls.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::Duration;
use tempfile::TempDir;

/// A `docker-registry` on loopback; ends with the value.
pub struct Registry {
    child: Child,
    _directory: TempDir,
    pub address: String,
}

/// "user" with the password "secret", as htpasswd(1) writes it with bcrypt.
const HTPASSWD: &str = "user:$2b$04$abcdefghijklmnopqrstuu2r9OfJnfCsdneAXAGHnS4UpFFP8WIrW\n";

impl Registry {
    pub fn start(with_login: bool) -> Self {
        let directory = TempDir::new().unwrap();
        let path = directory.path();
        // A port that is free now; nobody on this machine hands it out again at
        // once.
        let address = TcpListener::bind("127.0.0.1:0").unwrap().local_addr();
        let address = address.unwrap().to_string();
        let mut config = format!(
            "version: 0.1\nlog: {{level: error}}\nhttp: {{addr: {address}}}\n\
             storage: {{filesystem: {{rootdirectory: {}}}}}\n",
            path.join("data").display(),
        );
        if with_login {
            let users = path.join("htpasswd");
            fs::write(&users, HTPASSWD).unwrap();
            let users = users.display();
            config += &format!("auth: {{htpasswd: {{realm: test, path: {users}}}}}\n");
        }
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
            _directory: directory,
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

/// A registry of one image that fails in the middle of its only layer.
pub struct FailingRegistry {
    pub address: String,
}

/// How it fails.
#[derive(Clone, Copy)]
pub enum Failure {
    /// The layer's bytes never come.
    Stall,
    /// The connection ends after so many bytes of the layer; the next request
    /// goes on from there.
    Break(usize),
    /// The same, but every answer begins with the layer's first byte.
    BreakWithoutRanges(usize),
    /// The layer's last byte is missing, and the length given says so too.
    Short,
}

impl FailingRegistry {
    /// Has `image` as repository "x".
    pub fn start(image: &super::Image, failure: Failure) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let manifest = image.manifest.to_string().into_bytes();
        let config = image.config.to_string().into_bytes();
        let config_digest = accel_oci::Digest::of(&config);
        let answers = [
            ("/v2/".to_owned(), b"{}".to_vec()),
            ("/v2/x/manifests/latest".to_owned(), manifest),
            (format!("/v2/x/blobs/{config_digest}"), config),
        ];
        let layer = std::fs::read(image.blob_path(&image.layer(0))).unwrap();
        // Ends with the test's process.
        thread::spawn(move || {
            for connection in listener.incoming().flatten() {
                let (answers, layer) = (answers.clone(), layer.clone());
                thread::spawn(move || serve(connection, &answers, &layer, failure));
            }
        });
        Self { address }
    }
}

/// Answers requests until the connection ends.
fn serve(
    mut connection: TcpStream,
    answers: &[(String, Vec<u8>)],
    layer: &[u8],
    failure: Failure,
) -> Option<()> {
    let mut reader = BufReader::new(connection.try_clone().ok()?);
    loop {
        let mut request = String::new();
        reader.read_line(&mut request).ok().filter(|n| *n > 0)?;
        let path = request.split(' ').nth(1)?.to_owned();
        let mut from = 0;
        let mut line = String::new();
        while reader.read_line(&mut line).ok()? > 2 {
            let header = line.trim().to_ascii_lowercase();
            if let Some(range) = header.strip_prefix("range: bytes=") {
                from = range.trim_end_matches('-').parse().unwrap();
            }
            line.clear();
        }
        let (status, body, sent) = match answers.iter().find(|(known, _)| *known == path) {
            Some((_, body)) => ("200 OK", &body[..], body.len()),
            None => match failure {
                Failure::Stall => ("206 Partial Content", &layer[from..], 0),
                Failure::Short => (
                    "206 Partial Content",
                    &layer[from..layer.len() - 1],
                    usize::MAX,
                ),
                Failure::Break(sent) => ("206 Partial Content", &layer[from..], sent),
                Failure::BreakWithoutRanges(sent) => ("200 OK", layer, from + sent),
            },
        };
        let length = body.len();
        let head = format!("HTTP/1.1 {status}\r\nContent-Length: {length}\r\n\r\n");
        connection.write_all(head.as_bytes()).ok()?;
        connection.write_all(&body[..sent.min(length)]).ok()?;
        if sent == 0 {
            // Until the other side goes.
            let _ = reader.read(&mut [0]);
        }
        if sent < length {
            return None;
        }
    }
}
