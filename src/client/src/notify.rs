//! Telling systemd how this service is: sd_notify(3), for `Type=notify` and
//! `WatchdogSec`. Without systemd nothing happens.

use rustix::net::{AddressFamily, SendFlags, SocketAddrUnix, SocketFlags, SocketType};
use std::env;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::time::Duration;

/// The service manager, if there is one.
#[derive(Debug)]
pub struct Notifier {
    target: Option<(OwnedFd, SocketAddrUnix)>,
    watchdog: Option<Duration>,
}

impl Notifier {
    /// As the environment says.
    pub fn from_environment() -> Self {
        let path = env::var_os("NOTIFY_SOCKET");
        let address = path.and_then(|path| match path.as_bytes() {
            [b'@', name @ ..] => SocketAddrUnix::new_abstract_name(name).ok(),
            path => SocketAddrUnix::new(path).ok(),
        });
        let target = address.and_then(|address| {
            let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
            let family = AddressFamily::UNIX;
            let socket = rustix::net::socket_with(family, SocketType::DGRAM, flags, None);
            Some((socket.ok()?, address))
        });
        let number = |name| env::var(name).ok()?.parse::<u64>().ok();
        let ours = number("WATCHDOG_PID").is_none_or(|pid| pid == u64::from(std::process::id()));
        let limit = number("WATCHDOG_USEC").filter(|limit| ours && *limit > 0);
        Self {
            target,
            watchdog: limit.map(Duration::from_micros),
        }
    }

    /// How often [`alive`](Self::alive) is to be called.
    pub fn interval(&self) -> Option<Duration> {
        self.target.as_ref()?;
        self.watchdog.map(|limit| limit / 3)
    }

    /// The service serves.
    pub fn ready(&self, status: &str) {
        let status = status.replace('\n', " ");
        self.send(&format!("READY=1\nSTATUS={status}"));
    }

    /// The service ends.
    pub fn stopping(&self) {
        self.send("STOPPING=1");
    }

    /// The service is not stuck.
    pub fn alive(&self) {
        self.send("WATCHDOG=1");
    }

    fn send(&self, text: &str) {
        let Some((socket, address)) = &self.target else {
            return;
        };
        let flags = SendFlags::NOSIGNAL;
        if let Err(error) = rustix::net::sendto(socket, text.as_bytes(), flags, address) {
            tracing::debug!(%error, "cannot tell the service manager");
        }
    }
}
