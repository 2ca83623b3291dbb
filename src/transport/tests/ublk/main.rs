//! The ublk transport against the kernel's driver.
//!
//! On a kernel without the driver these tests say so and pass, unless
//! `ACCEL_REQUIRE_UBLK=1`.

#[path = "../common/mod.rs"]
mod common;
mod removal;
mod serving;
mod succession;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use std::{env, fs, thread};

use accel_transport::Reader;
use accel_transport::ublk::{self, Removal, UblkError, UblkOptions, UblkSpec, UblkTransport};
use common::PatternReader;

/// One test at a time: some of them count what is on the machine.
static MACHINE: Mutex<()> = Mutex::new(());

type Transport = UblkTransport<PatternReader>;

/// `None`, with the reason printed, where there is no ublk.
fn machine() -> Option<MutexGuard<'static, ()>> {
    let guard = MACHINE.lock().unwrap_or_else(PoisonError::into_inner);
    match ublk::probe() {
        Ok(_) => Some(guard),
        Err(error) if env::var("ACCEL_REQUIRE_UBLK").as_deref() == Ok("1") => {
            panic!("ublk is required: {error}")
        }
        Err(error) => {
            println!("skipped: {error}");
            None
        }
    }
}

fn start() -> Transport {
    let options = UblkOptions {
        drain_timeout: Duration::from_secs(60),
        ..UblkOptions::default()
    };
    UblkTransport::start(options).unwrap()
}

fn add(transport: &Transport, reader: PatternReader) -> (ublk::UblkDevice, Arc<PatternReader>) {
    let reader = Arc::new(reader);
    let device = transport
        .add(&UblkSpec::default(), Arc::clone(&reader), |_| Ok(()))
        .unwrap();
    (device, reader)
}

fn drop_caches() {
    fs::write("/proc/sys/vm/drop_caches", "1").unwrap();
}

/// Files of ublk devices in /dev.
fn nodes() -> Vec<String> {
    let mut nodes: Vec<_> = fs::read_dir("/dev")
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|name| name.starts_with("ublkb") || name.starts_with("ublkc"))
        .collect();
    nodes.sort();
    nodes
}

/// Removes it when udev has closed it.
fn remove<R: Reader>(transport: &UblkTransport<R>, id: u32) {
    let since = Instant::now();
    loop {
        match transport.remove(id, Removal::IfUnused) {
            Err(UblkError::InUse { .. }) if since.elapsed() < Duration::from_secs(60) => {
                thread::sleep(Duration::from_millis(20));
            }
            result => return result.unwrap(),
        }
    }
}
