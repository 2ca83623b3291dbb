//! Just enough HTTP for a Prometheus server to scrape.
//!
//! One connection, one answer. A thread of its own takes them one after another; who
//! dawdles is cut off, so that no scrape waits long for another.

use super::text::CONTENT_TYPE;
use std::fmt::Write as _;
use std::io::{self, Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

/// How long a client may take for all of it.
const PATIENCE: Duration = Duration::from_secs(2);
/// Longest request.
const MAX_REQUEST: usize = 16 << 10;
/// Pause after a failure to take a connection: descriptors may have run out.
const PAUSE: Duration = Duration::from_millis(200);

/// Serves `GET /metrics` at `address` on a thread, for as long as `render` gives a
/// text; returns where it listens.
pub fn start(
    address: SocketAddr,
    render: impl Fn() -> Option<String> + Send + 'static,
) -> io::Result<SocketAddr> {
    let listener = TcpListener::bind(address)?;
    let address = listener.local_addr()?;
    let run = move || {
        loop {
            let answered = listener
                .accept()
                .and_then(|(stream, _)| answer(stream, &render));
            match answered {
                Ok(true) => {}
                Ok(false) => return,
                Err(error) => {
                    tracing::debug!(%error, "a scrape failed");
                    thread::sleep(PAUSE);
                }
            }
        }
    };
    thread::Builder::new()
        .name("metrics".to_owned())
        .spawn(run)?;
    Ok(address)
}

/// Answers one client; false when there is nothing to serve any more.
fn answer(mut stream: TcpStream, render: impl Fn() -> Option<String>) -> io::Result<bool> {
    let until = Instant::now() + PATIENCE;
    let mut request = Vec::new();
    let mut buffer = [0; 4096];
    while !request.windows(4).any(|end| end == b"\r\n\r\n") {
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() || request.len() > MAX_REQUEST {
            return Ok(true);
        }
        stream.set_read_timeout(Some(left))?;
        match stream.read(&mut buffer) {
            Ok(0) => return Ok(true),
            Ok(len) => request.extend(&buffer[..len]),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            // Too slow, or gone.
            Err(_) => return Ok(true),
        }
    }
    let line = request.split(|&byte| byte == b'\r').next();
    let line = String::from_utf8_lossy(line.unwrap_or_default());
    let mut words = line.split(' ');
    let (method, target) = (words.next(), words.next());
    let path = target.and_then(|target| target.split('?').next());
    let (status, body) = match (method, path) {
        (Some("GET" | "HEAD"), Some("/metrics")) => match render() {
            Some(text) => ("200 OK", text),
            None => return Ok(false),
        },
        (Some("GET" | "HEAD"), _) => ("404 Not Found", "the metrics are at /metrics\n".to_owned()),
        _ => (
            "405 Method Not Allowed",
            "only GET is answered\n".to_owned(),
        ),
    };
    let mut text = format!("HTTP/1.1 {status}\r\nContent-Type: {CONTENT_TYPE}\r\n");
    // Writing to a string does not fail.
    let _ = write!(
        text,
        "Content-Length: {}\r\nConnection: close\r\n\r\n",
        body.len()
    );
    if method != Some("HEAD") {
        text.push_str(&body);
    }
    let mut rest = text.as_bytes();
    while !rest.is_empty() {
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            break;
        }
        stream.set_write_timeout(Some(left))?;
        match stream.write(rest) {
            Ok(len) => rest = &rest[len..],
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            // Whoever does not listen to the end is on his own.
            Err(_) => break,
        }
    }
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ask(address: SocketAddr, request: &str) -> String {
        let mut stream = TcpStream::connect(address).unwrap();
        stream.write_all(request.as_bytes()).unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        answer
    }

    #[test]
    fn only_metrics_are_answered_and_nobody_blocks_them() {
        let here = "127.0.0.1:0".parse().unwrap();
        let address = start(here, || Some("x 1\n".to_owned())).unwrap();
        // It never says what it wants.
        let _dawdler = TcpStream::connect(address).unwrap();
        let good = ask(address, "GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n");
        assert!(good.starts_with("HTTP/1.1 200 OK\r\n"), "{good}");
        assert!(
            good.contains(CONTENT_TYPE) && good.ends_with("\r\n\r\nx 1\n"),
            "{good}"
        );
        let head = ask(address, "HEAD /metrics HTTP/1.1\r\n\r\n");
        assert!(
            head.contains("Content-Length: 4") && head.ends_with("\r\n\r\n"),
            "{head}"
        );
        for (request, status) in [
            ("GET / HTTP/1.1\r\n\r\n", "404"),
            ("POST /metrics HTTP/1.1\r\n\r\n", "405"),
            ("\r\n\r\n", "405"),
        ] {
            let answer = ask(address, request);
            assert_eq!(answer.split(' ').nth(1), Some(status), "{answer}");
        }
        // One without an end is not answered.
        let mut endless = TcpStream::connect(address).unwrap();
        let _ = endless.write_all(&vec![b'x'; MAX_REQUEST + 5000]);
        assert!(!matches!(endless.read(&mut [0; 64]), Ok(1..)));
    }
}
