//! Prometheus' text format, version 0.0.4.

use std::collections::HashMap;
use std::fmt::{Display, Write as _};

/// What the text is, for HTTP.
pub const CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

/// Labels of one sample, in order.
pub type Labels<'a> = &'a [(&'a str, &'a str)];

/// How long things took.
#[derive(Debug, Clone, Copy)]
pub struct Histogram<'a> {
    /// The longest time of each bucket but the last, ascending, in microseconds.
    pub bounds: &'a [u64],
    /// How many lay in each bucket, above the bound before; the last has all that took longer.
    pub counts: &'a [u64],
    /// All of them together, in nanoseconds.
    pub nanoseconds: u64,
}

/// Metric families, in the order in which they were first met.
#[derive(Debug, Default)]
pub struct Exposition {
    families: Vec<String>,
    known: HashMap<&'static str, usize>,
}

impl Exposition {
    /// A number that only grows; its name ends with `_total`.
    pub fn counter(
        &mut self,
        name: &'static str,
        help: &str,
        labels: Labels<'_>,
        value: impl Display + Copy,
    ) {
        debug_assert!(name.ends_with("_total"), "{name}");
        self.sample(name, "counter", help, labels, value);
    }

    /// A number that is what it is.
    pub fn gauge(
        &mut self,
        name: &'static str,
        help: &str,
        labels: Labels<'_>,
        value: impl Display + Copy,
    ) {
        self.sample(name, "gauge", help, labels, value);
    }

    /// A histogram of seconds; its name ends with `_seconds`.
    pub fn histogram(
        &mut self,
        name: &'static str,
        help: &str,
        labels: Labels<'_>,
        value: Histogram<'_>,
    ) {
        debug_assert!(name.ends_with("_seconds"), "{name}");
        let text = self.family(name, "histogram", help);
        let mut count = 0;
        let bounds = value.bounds.iter().map(|bound| seconds(bound * 1000));
        let bounds = bounds.chain(["+Inf".to_owned()]);
        for (bound, more) in bounds.zip(value.counts) {
            count += more;
            line(text, &format!("{name}_bucket"), labels, Some(&bound), count);
        }
        let sum = seconds(value.nanoseconds);
        line(text, &format!("{name}_sum"), labels, None, &*sum);
        line(text, &format!("{name}_count"), labels, None, count);
    }

    fn sample(
        &mut self,
        name: &'static str,
        kind: &str,
        help: &str,
        labels: Labels<'_>,
        value: impl Display + Copy,
    ) {
        line(self.family(name, kind, help), name, labels, None, value);
    }

    /// Samples of a family stand together, after its head.
    fn family(&mut self, name: &'static str, kind: &str, help: &str) -> &mut String {
        let at = *self.known.entry(name).or_insert_with(|| {
            self.families
                .push(format!("# HELP {name} {help}\n# TYPE {name} {kind}\n"));
            self.families.len() - 1
        });
        &mut self.families[at]
    }

    /// The whole text.
    pub fn finish(self) -> String {
        self.families.concat()
    }
}

/// Nanoseconds as seconds, exactly.
fn seconds(nanoseconds: u64) -> String {
    let text = format!(
        "{}.{:09}",
        nanoseconds / 1_000_000_000,
        nanoseconds % 1_000_000_000
    );
    text.trim_end_matches('0').trim_end_matches('.').to_owned()
}

fn line(
    text: &mut String,
    name: &str,
    labels: Labels<'_>,
    le: Option<&str>,
    value: impl Display + Copy,
) {
    text.push_str(name);
    let le = le.map(|bound| ("le", bound));
    let mut open = '{';
    for (label, value) in labels.iter().copied().chain(le) {
        text.push(open);
        open = ',';
        text.push_str(label);
        text.push_str("=\"");
        for character in value.chars() {
            match character {
                '\\' => text.push_str("\\\\"),
                '"' => text.push_str("\\\""),
                '\n' => text.push_str("\\n"),
                other => text.push(other),
            }
        }
        text.push('"');
    }
    if open == ',' {
        text.push('}');
    }
    // Writing to a string does not fail.
    let _ = writeln!(text, " {value}");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn samples_of_a_family_stand_together_and_labels_are_escaped() {
        let mut text = Exposition::default();
        text.counter("a_total", "What a is.", &[("of", "x\\y\"\nz")], 1);
        text.gauge("b", "What b is.", &[], 2.5);
        text.counter("a_total", "What a is.", &[("of", "w"), ("at", "v")], 3);
        assert_eq!(
            text.finish(),
            "# HELP a_total What a is.\n# TYPE a_total counter\n\
             a_total{of=\"x\\\\y\\\"\\nz\"} 1\na_total{of=\"w\",at=\"v\"} 3\n\
             # HELP b What b is.\n# TYPE b gauge\nb 2.5\n"
        );
    }

    #[test]
    fn buckets_are_cumulative_and_the_last_one_is_the_count() {
        let times = Histogram {
            bounds: &[10, 1000, 2500, 30_000_000],
            counts: &[1, 0, 1, 0, 1],
            nanoseconds: 60_002_010_000,
        };
        let mut text = Exposition::default();
        text.histogram("t_seconds", "Time.", &[("of", "x")], times);
        let text = text.finish();
        for line in [
            "t_seconds_bucket{of=\"x\",le=\"0.00001\"} 1",
            "t_seconds_bucket{of=\"x\",le=\"0.001\"} 1",
            "t_seconds_bucket{of=\"x\",le=\"0.0025\"} 2",
            "t_seconds_bucket{of=\"x\",le=\"30\"} 2",
            "t_seconds_bucket{of=\"x\",le=\"+Inf\"} 3",
            "t_seconds_sum{of=\"x\"} 60.00201",
            "t_seconds_count{of=\"x\"} 3",
        ] {
            assert!(
                text.lines().any(|have| have == line),
                "{line} is not in\n{text}"
            );
        }
    }
}
