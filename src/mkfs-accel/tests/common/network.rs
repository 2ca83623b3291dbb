//! What stands between us and a registry: authorities, proxies, bad lines.

use super::services::{Certificate, tool};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::{ServerConfig, ServerConnection};
use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use std::thread;
use tempfile::TempDir;

/// An authority that nobody knows, and what it has signed.
pub struct Authority(TempDir);

impl Authority {
    pub fn new() -> Self {
        let authority = Self(TempDir::new().unwrap());
        let (key, certificate) = (authority.path("ca.key"), authority.certificate());
        let new = [
            "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2",
        ];
        let files = [
            "-subj",
            "/CN=authority",
            "-keyout",
            &key,
            "-out",
            &certificate,
        ];
        let marks = [
            "-addext",
            "basicConstraints=critical,CA:TRUE",
            "-addext",
            "keyUsage=critical,keyCertSign",
        ];
        // Its own file of settings might add others.
        let config = authority.path("config");
        fs::write(&config, "[req]\ndistinguished_name = name\n[name]\n").unwrap();
        tool(
            "openssl",
            &[&new[..], &files, &marks, &["-config", &config]].concat(),
        );
        authority
    }

    fn path(&self, name: &str) -> String {
        self.0.path().join(name).to_str().unwrap().to_owned()
    }

    pub fn certificate(&self) -> String {
        self.path("ca.pem")
    }

    /// A certificate for `names` (`DNS:…,IP:…`), to be a server or a client.
    pub fn sign(&self, names: &str) -> Certificate {
        let signed = Certificate::empty();
        let (key, request, extensions) = (signed.key(), self.path("csr"), self.path("extensions"));
        let config = self.path("config");
        let new = [
            "req", "-new", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=test",
        ];
        let files = ["-config", &config, "-keyout", &key, "-out", &request];
        tool("openssl", &[&new[..], &files].concat());
        let text = format!(
            "basicConstraints = critical,CA:FALSE\nsubjectAltName = {names}\nextendedKeyUsage = serverAuth,clientAuth\n"
        );
        fs::write(&extensions, text).unwrap();
        let (ca, ca_key, out) = (
            self.certificate(),
            self.path("ca.key"),
            signed.certificate(),
        );
        let sign = [
            "x509",
            "-req",
            "-days",
            "2",
            "-CAcreateserial",
            "-in",
            &request,
        ];
        let files = [
            "-CA",
            &ca,
            "-CAkey",
            &ca_key,
            "-extfile",
            &extensions,
            "-out",
            &out,
        ];
        tool("openssl", &[&sign[..], &files].concat());
        signed
    }
}

/// A proxy that connects whoever asks to one address, whatever they ask for. Ends with
/// the test's process.
pub struct ForwardProxy {
    pub address: String,
    /// The first line of every request.
    pub requests: Arc<Mutex<Vec<String>>>,
}

impl ForwardProxy {
    /// `login` is base64 of `NAME:PASSWORD`, if one is wanted.
    pub fn start(upstream: &str, login: Option<&'static str>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let proxy = Self {
            address: listener.local_addr().unwrap().to_string(),
            requests: Arc::default(),
        };
        let (upstream, requests) = (upstream.to_owned(), Arc::clone(&proxy.requests));
        thread::spawn(move || {
            for connection in listener.incoming().flatten() {
                let (upstream, requests) = (upstream.clone(), Arc::clone(&requests));
                thread::spawn(move || forward(&connection, &upstream, login, &requests));
            }
        });
        proxy
    }

    pub fn count(&self) -> usize {
        self.requests.lock().unwrap().len()
    }
}

fn forward(
    mut client: &TcpStream,
    upstream: &str,
    login: Option<&str>,
    requests: &Mutex<Vec<String>>,
) -> Option<()> {
    let mut reader = BufReader::new(client);
    let mut line = String::new();
    reader.read_line(&mut line).ok().filter(|n| *n > 0)?;
    requests.lock().unwrap().push(line.trim().to_owned());
    let mut head = String::new();
    let mut known = login.is_none();
    loop {
        let mut header = String::new();
        reader.read_line(&mut header).ok()?;
        if header.trim().is_empty() {
            break;
        }
        let lower = header.to_ascii_lowercase();
        if lower.starts_with("proxy-authorization:") {
            known = login.is_some_and(|login| header.trim().ends_with(login));
        } else if !lower.starts_with("connection:") {
            head += &header;
        }
    }
    if !known {
        let answer = "HTTP/1.1 407 Proxy Authentication Required\r\nProxy-Authenticate: Basic\r\nContent-Length: 0\r\nConnection: close\r\n\r\n";
        return client.write_all(answer.as_bytes()).ok();
    }
    let mut server = TcpStream::connect(upstream).ok()?;
    match line.strip_prefix("CONNECT ") {
        Some(_) => client.write_all(b"HTTP/1.1 200 Connected\r\n\r\n").ok()?,
        None => {
            // "GET http://host/path HTTP/1.1"
            let (method, rest) = line.split_once(" http://")?;
            let path = &rest[rest.find('/')?..];
            let request = format!("{method} {path}{head}Connection: close\r\n\r\n");
            server.write_all(request.as_bytes()).ok()?;
        }
    }
    let (from, mut to) = (client.try_clone().ok()?, server.try_clone().ok()?);
    // What the reader has read already is nothing: the client waits for an answer.
    let up = thread::spawn(move || {
        let _ = std::io::copy(&mut &from, &mut to);
        let _ = to.shutdown(Shutdown::Write);
    });
    let _ = std::io::copy(&mut server, &mut client);
    let _ = client.shutdown(Shutdown::Both);
    up.join().ok()
}

/// A line to a registry on which the first connections end after some bytes from the
/// client. Ends with the test's process.
pub struct BadLine {
    pub address: String,
    /// How many connections were cut.
    pub cut: Arc<Mutex<usize>>,
}

impl BadLine {
    pub fn start(upstream: &str, connections: usize, bytes: u64) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let line = Self {
            address: listener.local_addr().unwrap().to_string(),
            cut: Arc::default(),
        };
        let (upstream, cut) = (upstream.to_owned(), Arc::clone(&line.cut));
        thread::spawn(move || {
            for client in listener.incoming().flatten() {
                let Ok(server) = TcpStream::connect(&upstream) else {
                    continue;
                };
                let (mut from, mut to) = (server.try_clone().unwrap(), client.try_clone().unwrap());
                thread::spawn(move || {
                    let _ = std::io::copy(&mut from, &mut to);
                    let _ = to.shutdown(Shutdown::Both);
                });
                let cut = Arc::clone(&cut);
                thread::spawn(move || {
                    let most = match *cut.lock().unwrap() < connections {
                        true => bytes,
                        false => u64::MAX,
                    };
                    let copied = std::io::copy(&mut (&client).take(most), &mut &server);
                    if copied.is_ok_and(|copied| copied == most) {
                        *cut.lock().unwrap() += 1;
                        let _ = client.shutdown(Shutdown::Both);
                    }
                    let _ = server.shutdown(Shutdown::Both);
                });
            }
        });
        line
    }
}

/// A server that agrees upon TLS with whoever comes, and hangs up without a word: what a
/// client sees of one that wants its certificate, when the alert comes too late. Ends with
/// the test's process.
pub struct HangsUp {
    pub address: String,
}

impl HangsUp {
    pub fn start(certificate: &Certificate) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let chain = vec![CertificateDer::from_pem_file(certificate.certificate()).unwrap()];
        let key = PrivateKeyDer::from_pem_file(certificate.key()).unwrap();
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let config = ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(chain, key)
            .unwrap();
        let config = Arc::new(config);
        thread::spawn(move || {
            for mut client in listener.incoming().flatten() {
                let mut tls = ServerConnection::new(Arc::clone(&config)).unwrap();
                while tls.is_handshaking() && tls.complete_io(&mut client).is_ok() {}
            }
        });
        Self { address }
    }
}
