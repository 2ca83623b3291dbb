//! Lines of JSON, and a file descriptor, over a Unix stream socket.

use crate::protocol::{MAX_LINE, Reply};
use anyhow::{Context, Result, bail};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags,
};
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

/// How long to ask again: one program takes another's place, or memory is short.
const ASK_AGAIN: Duration = Duration::from_secs(60);
/// Pause before the next one is asked.
const PAUSE: Duration = Duration::from_millis(20);

/// Writes `message` as a line, and passes `fd` with its first byte.
pub fn send(stream: &UnixStream, message: &impl Serialize, fd: Option<&OwnedFd>) -> Result<()> {
    let mut line = serde_json::to_vec(message)?;
    line.push(b'\n');
    let mut sent = 0;
    let mut fd = fd;
    while sent < line.len() {
        let fds = fd.map(|fd| [fd.as_fd()]);
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if let Some(fds) = &fds {
            control.push(SendAncillaryMessage::ScmRights(fds));
        }
        let bytes = [IoSlice::new(&line[sent..])];
        match rustix::net::sendmsg(stream, &bytes, &mut control, SendFlags::NOSIGNAL) {
            Ok(len) => {
                sent += len;
                fd = None;
            }
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

/// Reads a line, and the descriptor that came with it, if one did.
pub fn receive<T: DeserializeOwned>(stream: &UnixStream) -> Result<(T, Option<OwnedFd>)> {
    let mut line = Vec::new();
    let mut fd = None;
    let mut buffer = vec![0; 64 << 10];
    loop {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut bytes = [IoSliceMut::new(&mut buffer)];
        let flags = RecvFlags::CMSG_CLOEXEC;
        let received = match rustix::net::recvmsg(stream, &mut bytes, &mut control, flags) {
            Ok(received) => received,
            Err(rustix::io::Errno::INTR) => continue,
            Err(error) => return Err(error.into()),
        };
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(fds) = message {
                fd = fds.last().or(fd);
            }
        }
        line.extend_from_slice(&buffer[..received.bytes]);
        if let Some(end) = line.iter().position(|&byte| byte == b'\n') {
            return Ok((serde_json::from_slice(&line[..end])?, fd));
        }
        if received.bytes == 0 {
            bail!("the other side hung up");
        }
        if line.len() > MAX_LINE {
            bail!("the other side's message is too long");
        }
    }
}

/// Asks the daemon at `socket` one thing.
pub fn ask<T: DeserializeOwned>(
    socket: &Path,
    command: &impl Serialize,
    fd: Option<&OwnedFd>,
) -> Result<T> {
    ask_for(socket, command, fd, None)
}

/// The same; gives up when the daemon says nothing for so long.
pub fn ask_within<T: DeserializeOwned>(
    socket: &Path,
    command: &impl Serialize,
    patience: Duration,
) -> Result<T> {
    ask_for(socket, command, None, Some(patience))
}

pub(crate) fn ask_for<T: DeserializeOwned>(
    socket: &Path,
    command: &impl Serialize,
    fd: Option<&OwnedFd>,
    patience: Option<Duration>,
) -> Result<T> {
    let since = Instant::now();
    loop {
        match ask_once(socket, command, fd, patience)? {
            Reply::Ok(answer) => return Ok(answer),
            // Whoever comes next finds the connection waiting.
            Reply::Again(_) if since.elapsed() < ASK_AGAIN => thread::sleep(PAUSE),
            Reply::Again(error) | Reply::Error(error) => bail!(error),
        }
    }
}

fn ask_once<T: DeserializeOwned>(
    socket: &Path,
    command: &impl Serialize,
    fd: Option<&OwnedFd>,
    patience: Option<Duration>,
) -> Result<Reply<T>> {
    let stream = UnixStream::connect(socket).with_context(|| {
        format!(
            "cannot reach the daemon at {}: is `ublk-server serve` running there, and is this root?",
            socket.display()
        )
    })?;
    let trouble = || format!("no answer from the daemon at {}", socket.display());
    stream.set_read_timeout(patience).with_context(trouble)?;
    stream.set_write_timeout(patience).with_context(trouble)?;
    // One that refuses a client says so without listening, and hangs up.
    let sent = send(&stream, command, fd);
    match (receive::<Reply<T>>(&stream), sent) {
        (Ok((reply, _)), _) => Ok(reply),
        (Err(error), Ok(())) | (Err(_), Err(error)) => Err(error).with_context(trouble),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::io::{Read, Write};

    #[test]
    fn a_line_and_a_file_arrive() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(b"x").unwrap();
        let long = "y".repeat(300_000);
        let sender = std::thread::spawn({
            let long = long.clone();
            move || send(&ours, &long, Some(&file.into())).unwrap()
        });
        let (text, fd) = receive::<String>(&theirs).unwrap();
        sender.join().unwrap();
        assert!(text == long);
        let mut content = String::new();
        let mut file = File::from(fd.unwrap());
        std::io::Seek::rewind(&mut file).unwrap();
        file.read_to_string(&mut content).unwrap();
        assert_eq!(content, "x");
    }

    #[test]
    fn half_a_line_is_an_error() {
        let (mut ours, theirs) = UnixStream::pair().unwrap();
        ours.write_all(b"{\"ok\"").unwrap();
        drop(ours);
        assert!(receive::<String>(&theirs).is_err());
    }
}
