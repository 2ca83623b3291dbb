//! What the daemon tells Prometheus. `ARCHITECTURE.md` has the list.
//!
//! Everything is read from counters that exist anyway, at the moment of a scrape, and
//! nothing of it waits for a source. Labels are bounded: sources are named at start,
//! and of more than [`MOST_DEVICES`] devices the rest is only in the sums.

pub use accel_metrics::start;

use crate::admin;
use crate::engine::Totals;
use crate::registry::Counted;
use crate::remake::Remake;
use crate::serve::Daemon;
use accel_metrics::{Exposition, Histogram};
use accel_source::{DiskCache, LATENCY_BOUNDS, Latencies};
use accel_transport::ublk::Polls;
use std::fs;
use std::sync::atomic::Ordering::Relaxed;

/// Devices with series of their own.
pub const MOST_DEVICES: usize = 256;

/// All metrics of the daemon, as text.
pub fn render(daemon: &Daemon) -> String {
    let mut text = Exposition::default();
    let exports = daemon.registry.counted();
    general(&mut text, daemon, exports.len());
    totals(&mut text, &daemon.engine.totals());
    devices(&mut text, &exports);
    cache(&mut text, daemon);
    sources(&mut text, daemon);
    if let Some(transport) = daemon.registry.devices().ublk() {
        polls(&mut text, transport.polls());
    }
    if let Some(cache) = &daemon.disk_cache {
        disk_cache(&mut text, cache);
    }
    if let Some(remake) = &daemon.remake {
        remakes(&mut text, remake);
    }
    process(&mut text);
    text.finish()
}

fn general(text: &mut Exposition, daemon: &Daemon, exports: usize) {
    let transport = daemon.registry.devices().name();
    text.gauge(
        "image_accel_build_info",
        "Always 1; version and transport are labels.",
        &[
            ("version", env!("CARGO_PKG_VERSION")),
            ("transport", transport),
        ],
        1,
    );
    text.gauge(
        "image_accel_devices",
        "Layers that are exported.",
        &[],
        exports,
    );
    text.gauge(
        "image_accel_holders",
        "Mounts and other users of images.",
        &[],
        daemon.registry.holders(),
    );
    let (recovered, unrecovered) = daemon.registry.recoveries();
    text.counter(
        "image_accel_recovered_devices_total",
        "Devices taken over from an earlier daemon.",
        &[],
        recovered,
    );
    text.gauge(
        "image_accel_unrecovered_devices",
        "Devices of an earlier daemon that could not be taken over yet; their readers wait.",
        &[],
        unrecovered,
    );
    text.gauge(
        "image_accel_requests_in_flight",
        "Requests of the kernel that are not answered yet.",
        &[],
        daemon.engine.unanswered(),
    );
}

/// Of how a piece of a request was served.
fn lookups(totals: &Totals) -> [(&'static str, u64); 3] {
    let missed = totals.misses.saturating_sub(totals.joined);
    [
        ("hit", totals.hits),
        ("miss", missed),
        ("joined", totals.joined),
    ]
}

fn times(latencies: &Latencies) -> Histogram<'_> {
    Histogram {
        bounds: &LATENCY_BOUNDS,
        counts: &latencies.counts,
        nanoseconds: latencies.nanoseconds,
    }
}

fn totals(text: &mut Exposition, totals: &Totals) {
    for (name, help, value) in [
        (
            "image_accel_requests_total",
            "Requests of the kernel, of all devices there ever were.",
            totals.requests,
        ),
        (
            "image_accel_served_bytes_total",
            "Bytes given to the kernel.",
            totals.served_bytes,
        ),
        (
            "image_accel_fetched_bytes_total",
            "Bytes of images and their indexes that sources gave.",
            totals.source_bytes,
        ),
        (
            "image_accel_background_bytes_total",
            "Those of them that nobody had asked for yet.",
            totals.background_bytes,
        ),
        (
            "image_accel_errors_total",
            "Pieces of requests that failed.",
            totals.errors,
        ),
        (
            "image_accel_digest_failures_total",
            "Answers of sources that did not match their digest.",
            totals.digest_failures,
        ),
    ] {
        text.counter(name, help, &[], value);
    }
    for (result, value) in lookups(totals) {
        text.counter(
            "image_accel_lookups_total",
            "Pieces of requests: found in memory (hit), read (miss), or waiting for the \
             read of another (joined).",
            &[("result", result)],
            value,
        );
    }
    text.histogram(
        "image_accel_request_wait_seconds",
        "Requests that waited for a source: from then until they were answered.",
        &[],
        times(&totals.waited),
    );
    text.histogram(
        "image_accel_request_cached_seconds",
        "One in 64 of the requests served from memory: from the queue to the answer.",
        &[],
        times(&totals.from_memory),
    );
}

fn devices(text: &mut Exposition, exports: &[Counted]) {
    text.gauge(
        "image_accel_devices_without_series",
        "Devices beyond those that have series of their own.",
        &[],
        exports.len().saturating_sub(MOST_DEVICES),
    );
    for export in exports.iter().take(MOST_DEVICES) {
        let totals = &export.totals;
        let labels = [("layer", &*export.layer), ("device", &*export.device)];
        for (name, help, value) in [
            (
                "image_accel_device_requests_total",
                "Requests of the kernel, by device.",
                totals.requests,
            ),
            (
                "image_accel_device_served_bytes_total",
                "Bytes given to the kernel, by device.",
                totals.served_bytes,
            ),
            (
                "image_accel_device_fetched_bytes_total",
                "Bytes that sources gave, by device.",
                totals.source_bytes,
            ),
            (
                "image_accel_device_errors_total",
                "Pieces of requests that failed, by device.",
                totals.errors,
            ),
            (
                "image_accel_device_digest_failures_total",
                "Answers of sources that did not match their digest, by device.",
                totals.digest_failures,
            ),
        ] {
            text.counter(name, help, &labels, value);
        }
        for (result, value) in lookups(totals) {
            text.counter(
                "image_accel_device_lookups_total",
                "Pieces of requests by device: hit, miss or joined.",
                &[labels[0], labels[1], ("result", result)],
                value,
            );
        }
        text.histogram(
            "image_accel_device_request_wait_seconds",
            "Requests that waited for a source, by device.",
            &labels,
            times(&totals.waited),
        );
    }
}

fn cache(text: &mut Exposition, daemon: &Daemon) {
    let engine = &daemon.engine;
    let (chunks, pages) = (engine.arena().chunks(), engine.arena().pages());
    for (kind, pool, used, counters) in [
        (
            "chunk",
            chunks,
            engine.cached_chunks(),
            engine.chunk_counters(),
        ),
        ("page", pages, engine.cached_pages(), engine.page_counters()),
    ] {
        let labels = [("kind", kind)];
        let bytes = |slots: usize| slots as u64 * pool.slot_size() as u64;
        text.gauge(
            "image_accel_cache_capacity_bytes",
            "Memory for chunks of images, and for pages of their indexes.",
            &labels,
            bytes(pool.capacity()),
        );
        text.gauge(
            "image_accel_cache_used_bytes",
            "Memory that holds verified content.",
            &labels,
            bytes(used),
        );
        for (name, help, value) in [
            (
                "image_accel_cache_hits_total",
                "Look-ups in the cache that found what they wanted.",
                &counters.hits,
            ),
            (
                "image_accel_cache_misses_total",
                "Look-ups that began a read.",
                &counters.misses,
            ),
            (
                "image_accel_cache_joined_total",
                "Look-ups that waited for a read that another had begun.",
                &counters.joined,
            ),
            (
                "image_accel_cache_evictions_total",
                "What had to leave the cache.",
                &counters.evicted,
            ),
        ] {
            text.counter(name, help, &labels, value.load(Relaxed));
        }
    }
    text.gauge(
        "image_accel_cache_waiting_loads",
        "Reads that wait for memory.",
        &[],
        engine.waiting_for_memory(),
    );
    text.gauge(
        "image_accel_cache_huge_bytes",
        "Memory of the cache that the kernel was asked to put together from huge pages, and has.",
        &[],
        engine.arena().huge_bytes(),
    );
}

fn sources(text: &mut Exposition, daemon: &Daemon) {
    text.counter(
        "image_accel_failed_reads_total",
        "Reads that failed at every source.",
        &[],
        daemon.sources.failed(),
    );
    for (source, tally) in admin::sources(daemon).iter().zip(daemon.sources.tallies()) {
        let labels = [("source", source.name.as_str())];
        text.gauge(
            "image_accel_source_in_use",
            "1 if the source is in use, 0 if it is set aside.",
            &labels,
            u8::from(source.in_use),
        );
        text.gauge(
            "image_accel_source_workers_dying",
            "Workers that were killed and are stuck in the kernel.",
            &labels,
            source.dying,
        );
        for (name, help, value) in [
            (
                "image_accel_source_reads_total",
                "Reads that the source answered well.",
                source.reads,
            ),
            (
                "image_accel_source_operations_total",
                "Reads of files that the source was asked for; neighbours are read in one.",
                source.operations,
            ),
            (
                "image_accel_source_bytes_total",
                "Bytes that the source gave, look-ups and probes included.",
                source.bytes,
            ),
            (
                "image_accel_source_failures_total",
                "Attempts at the source that failed or ran out of time.",
                source.failed_attempts,
            ),
            (
                "image_accel_source_digest_failures_total",
                "Answers of the source that did not match their digest.",
                tally.wrong.load(Relaxed),
            ),
            (
                "image_accel_source_set_aside_total",
                "How often the source was set aside.",
                source.set_aside,
            ),
            (
                "image_accel_source_workers_started_total",
                "Worker processes started for the source.",
                source.workers,
            ),
        ] {
            text.counter(name, help, &labels, value);
        }
        text.histogram(
            "image_accel_source_read_seconds",
            "From asking the source until it answered, well or not.",
            &labels,
            times(&tally.latency.snapshot()),
        );
    }
}

fn polls(text: &mut Exposition, polls: Polls) {
    for (result, value) in [("found", polls.found), ("missed", polls.missed)] {
        text.counter(
            "image_accel_polls_total",
            "How often threads looked for a request before they slept, and whether one came.",
            &[("result", result)],
            value,
        );
    }
    text.counter(
        "image_accel_poll_seconds_total",
        "How long threads looked for requests.",
        &[],
        polls.spent.as_secs_f64(),
    );
}

fn disk_cache(text: &mut Exposition, cache: &DiskCache) {
    let status = crate::disk_cache::status(cache);
    text.gauge(
        "image_accel_disk_cache_in_use",
        "1 if the disk cache is read and written, 0 if it is left alone.",
        &[],
        u8::from(status.in_use),
    );
    text.gauge(
        "image_accel_disk_cache_capacity_bytes",
        "How large the disk cache may become.",
        &[],
        status.size,
    );
    text.gauge(
        "image_accel_disk_cache_used_bytes",
        "What of it holds content.",
        &[],
        status.used,
    );
    for (name, help, value) in [
        (
            "image_accel_disk_cache_hits_total",
            "Requests answered from the disk cache.",
            status.hits,
        ),
        (
            "image_accel_disk_cache_misses_total",
            "Requests for what the disk cache does not hold.",
            status.misses,
        ),
        (
            "image_accel_disk_cache_written_total",
            "Chunks and pages written to the disk cache.",
            status.written,
        ),
        (
            "image_accel_disk_cache_skipped_total",
            "Chunks and pages not written: too many were on their way.",
            status.skipped,
        ),
        (
            "image_accel_disk_cache_evictions_total",
            "What had to leave the disk cache.",
            status.evicted,
        ),
        (
            "image_accel_disk_cache_damaged_total",
            "What had changed on disk: dropped, and fetched again.",
            status.damaged,
        ),
        (
            "image_accel_disk_cache_failures_total",
            "Reads and writes of the disk cache that failed or took too long.",
            status.failed,
        ),
    ] {
        text.counter(name, help, &[], value);
    }
}

fn remakes(text: &mut Exposition, remake: &Remake) {
    let status = remake.status();
    text.gauge(
        "image_accel_remake_known_layers",
        "Exported layers that could be made again.",
        &[],
        status.known,
    );
    text.counter(
        "image_accel_remade_layers_total",
        "Layers made again from where they came from.",
        &[],
        status.made,
    );
    text.counter(
        "image_accel_remake_failures_total",
        "Attempts at that which failed.",
        &[],
        status.failed,
    );
}

/// The daemon's process, by the names that all exporters use. What cannot be read is
/// left out.
fn process(text: &mut Exposition) {
    if let Ok(files) = fs::read_dir("/proc/self/fd") {
        text.gauge(
            "process_open_fds",
            "Open file descriptors.",
            &[],
            files.count(),
        );
    }
    let stat = fs::read_to_string("/proc/self/stat").unwrap_or_default();
    // The name, which comes second, may hold spaces; after it the state is field 3.
    let fields = stat.rsplit_once(") ").map_or("", |(_, rest)| rest);
    let field = |number: usize| -> Option<u64> {
        let word = fields.split(' ').nth(number - 3)?;
        word.parse().ok()
    };
    let ticks = rustix::param::clock_ticks_per_second();
    if let (Some(user), Some(system)) = (field(14), field(15)) {
        // Exact for every number of ticks that a float holds.
        #[allow(clippy::cast_precision_loss)]
        let seconds = (user + system) as f64 / ticks as f64;
        text.counter(
            "process_cpu_seconds_total",
            "CPU time of the daemon, its workers not included.",
            &[],
            seconds,
        );
    }
    if let Some(threads) = field(20) {
        text.gauge("process_threads", "Threads of the daemon.", &[], threads);
    }
    if let Some(pages) = field(24) {
        text.gauge(
            "process_resident_memory_bytes",
            "Resident memory of the daemon, what it shares with its workers included.",
            &[],
            pages * rustix::param::page_size() as u64,
        );
    }
}
