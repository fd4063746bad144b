//! TensorBoard's event files: scalars, pictures and the run's settings.
//!
//! A file is a series of records, each a protocol buffer `tensorflow.Event` between two checksums (TensorFlow's
//! `tfrecord` and `event.proto`). The few messages that are needed are written here, field by field.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use super::details::Png;
use crate::error::{At, Result};

/// An event file of one process.
pub struct EventFile {
    file: File,
    path: PathBuf,
}

/// A setting's value.
#[derive(Clone, Debug, PartialEq)]
pub enum Hparam {
    /// A number.
    Number(f64),
    /// True or false.
    Truth(bool),
    /// Anything else, as text.
    Text(String),
}

impl EventFile {
    /// Creates a file in the run's directory. Events of earlier files from `step` on are void: a resumed run does
    /// those steps again.
    pub fn create(dir: &Path, step: u64) -> Result<Self> {
        let now = wall_time();
        let path = dir.join(format!("events.out.tfevents.{:010}.{}.vitrum", now as u64, std::process::id()));
        let file = OpenOptions::new().create(true).append(true).open(&path).at(path.display())?;
        let mut events = Self { file, path };
        let mut version = Message::event(now, 0);
        version.text(3, "brain.Event:2");
        events.write(&version)?;
        let mut start = Message::event(now, step);
        // SessionLog { status: START }
        start.message(7, Message::default().number(1, 1));
        events.write(&start)?;
        Ok(events)
    }

    /// Named values of one step.
    pub fn scalars(&mut self, step: u64, values: &[(String, f64)]) -> Result<()> {
        let mut summary = Message::default();
        for (tag, value) in values {
            let mut of = Message::default();
            of.text(1, tag);
            of.float(2, *value as f32);
            summary.message(1, &of);
        }
        self.summary(step, &summary)
    }

    /// A picture.
    pub fn image(&mut self, step: u64, tag: &str, png: &Png) -> Result<()> {
        let mut image = Message::default();
        // 3: the colours are RGB.
        image.number(1, png.height as u64).number(2, png.width as u64).number(3, 3).bytes(4, &png.file);
        let mut of = Message::default();
        of.text(1, tag);
        of.message(4, &image);
        let mut summary = Message::default();
        summary.message(1, &of);
        self.summary(step, &summary)
    }

    /// The run's settings, for the tab that compares runs.
    pub fn settings(&mut self, settings: &[(String, Hparam)]) -> Result<()> {
        let mut start = Message::default();
        for (name, value) in settings {
            let mut of = Message::default();
            match value {
                Hparam::Number(number) => of.double(2, *number),
                Hparam::Text(text) => of.text(3, text),
                Hparam::Truth(truth) => of.number(4, u64::from(*truth)),
            };
            let mut entry = Message::default();
            entry.text(1, name);
            entry.message(2, &of);
            start.message(1, &entry);
        }
        start.double(5, wall_time());
        let mut data = Message::default();
        data.number(1, 0).message(3, &start);
        let mut plugin = Message::default();
        plugin.text(1, "hparams").bytes(2, &data.0);
        let mut metadata = Message::default();
        metadata.message(1, &plugin);
        // The plugin expects a tensor and ignores its value: one float.
        let mut shape = Message::default();
        shape.message(2, Message::default().number(1, 1));
        let mut tensor = Message::default();
        tensor.number(1, 1).message(2, &shape).bytes(4, &0f32.to_le_bytes());
        let mut of = Message::default();
        of.text(1, "_hparams_/session_start_info");
        of.message(8, &tensor).message(9, &metadata);
        let mut summary = Message::default();
        summary.message(1, &of);
        self.summary(0, &summary)
    }

    fn summary(&mut self, step: u64, summary: &Message) -> Result<()> {
        let mut event = Message::event(wall_time(), step);
        event.message(5, summary);
        self.write(&event)
    }

    /// Length, its checksum, the event, its checksum; in one call, so that a reader never waits for half a record.
    fn write(&mut self, event: &Message) -> Result<()> {
        let length = (event.0.len() as u64).to_le_bytes();
        let mut record = length.to_vec();
        record.extend(masked_crc(&length).to_le_bytes());
        record.extend(&event.0);
        record.extend(masked_crc(&event.0).to_le_bytes());
        self.file.write_all(&record).at(self.path.display())
    }
}

fn wall_time() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |since| since.as_secs_f64())
}

/// A protocol buffer under construction.
#[derive(Default)]
struct Message(Vec<u8>);

impl Message {
    /// An `Event` with its time and step.
    fn event(wall_time: f64, step: u64) -> Self {
        let mut event = Self::default();
        event.double(1, wall_time).number(2, step);
        event
    }

    fn varint(&mut self, mut value: u64) {
        while value >= 0x80 {
            self.0.push(value as u8 | 0x80);
            value >>= 7;
        }
        self.0.push(value as u8);
    }

    fn number(&mut self, field: u64, value: u64) -> &mut Self {
        self.varint(field << 3);
        self.varint(value);
        self
    }

    fn double(&mut self, field: u64, value: f64) -> &mut Self {
        self.varint(field << 3 | 1);
        self.0.extend(value.to_le_bytes());
        self
    }

    fn float(&mut self, field: u64, value: f32) -> &mut Self {
        self.varint(field << 3 | 5);
        self.0.extend(value.to_le_bytes());
        self
    }

    fn bytes(&mut self, field: u64, bytes: &[u8]) -> &mut Self {
        self.varint(field << 3 | 2);
        self.varint(bytes.len() as u64);
        self.0.extend(bytes);
        self
    }

    fn text(&mut self, field: u64, text: &str) -> &mut Self {
        self.bytes(field, text.as_bytes())
    }

    fn message(&mut self, field: u64, message: &Message) -> &mut Self {
        self.bytes(field, &message.0)
    }
}

/// CRC-32C, rotated and shifted as records have it.
fn masked_crc(bytes: &[u8]) -> u32 {
    let crc = crc32c(bytes);
    crc.rotate_right(15).wrapping_add(0xa282_ead8)
}

fn crc32c(bytes: &[u8]) -> u32 {
    const TABLE: [u32; 256] = {
        let mut table = [0u32; 256];
        let mut i = 0;
        while i < 256 {
            let (mut value, mut bit) = (i as u32, 0);
            while bit < 8 {
                value = if value & 1 == 1 { value >> 1 ^ 0x82f6_3b78 } else { value >> 1 };
                bit += 1;
            }
            table[i] = value;
            i += 1;
        }
        table
    };
    !bytes.iter().fold(!0u32, |crc, byte| TABLE[((crc ^ u32::from(*byte)) & 255) as usize] ^ crc >> 8)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_checksum_is_the_published_one() {
        // RFC 3720, B.4.
        assert_eq!(crc32c(&[0; 32]), 0x8a91_36aa);
        assert_eq!(crc32c(&[0xff; 32]), 0x62a8_ab43);
        assert_eq!(crc32c(b"123456789"), 0xe306_9283);
    }

    #[test]
    fn records_follow_each_other_without_gaps() {
        let dir = tempfile::tempdir().unwrap();
        let mut events = EventFile::create(dir.path(), 0).unwrap();
        events.scalars(300, &[("val/top1".into(), 0.5)]).unwrap();
        let bytes = crate::files::read(&events.path).unwrap();
        let (mut at, mut records) = (0, Vec::new());
        while at < bytes.len() {
            let length = u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap()) as usize;
            let data = &bytes[at + 12..at + 12 + length];
            assert_eq!(bytes[at + 12 + length..at + 16 + length], masked_crc(data).to_le_bytes());
            records.push(data.to_vec());
            at += 16 + length;
        }
        assert_eq!(records.len(), 3);
        // Step 300 is the varint AC 02.
        assert_eq!(records[2][9..12], [0x10, 0xac, 0x02]);
        assert!(records[2].windows(8).any(|part| part == b"val/top1"));
    }
}
