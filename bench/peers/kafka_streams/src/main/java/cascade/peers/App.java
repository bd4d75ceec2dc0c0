package cascade.peers;

import java.time.Duration;
import java.util.Map;
import java.util.Properties;
import java.util.concurrent.CountDownLatch;
import org.apache.kafka.clients.consumer.ConsumerConfig;
import org.apache.kafka.clients.producer.ProducerConfig;
import org.apache.kafka.common.serialization.Serde;
import org.apache.kafka.common.serialization.Serdes;
import org.apache.kafka.streams.CloseOptions;
import org.apache.kafka.streams.CloseOptions.GroupMembershipOperation;
import org.apache.kafka.streams.KafkaStreams;
import org.apache.kafka.streams.StreamsConfig;
import org.apache.kafka.streams.Topology;
import org.apache.kafka.streams.errors.StreamsUncaughtExceptionHandler.StreamThreadExceptionResponse;
import org.apache.kafka.streams.state.KeyValueStore;
import org.apache.kafka.streams.state.StoreBuilder;
import org.apache.kafka.streams.state.Stores;

/**
 * A Kafka Streams application: one processor with two in-memory stores, by card and by terminal, with changelogs.
 *
 * <p>Its features are those of the peers in Python (bench/peers/scoring.py). The terminal's store belongs to the task, so
 * with several partitions a terminal's features use the cards of a single partition; to repartition would take the stream
 * through Kafka a second time. The Triton call blocks the stream thread: a processor cannot forward from another thread.
 * It delivers at least once and commits every five seconds.
 */
public final class App {
    private static final long CACHE_BYTES = 64L << 20;

    private App() {}

    public static void main(String[] arguments) {
        Options options = new Options(arguments);
        CountDownLatch ended = new CountDownLatch(1);
        try (KafkaStreams streams = new KafkaStreams(topology(options), settings(options))) {
            boolean[] failed = {false};
            streams.setUncaughtExceptionHandler(error -> {
                System.err.println("kafka-streams: " + error);
                failed[0] = true;
                ended.countDown();
                return StreamThreadExceptionResponse.SHUTDOWN_CLIENT;
            });
            // so that the next start need not wait for the session timeout
            CloseOptions leave = CloseOptions.groupMembershipOperation(GroupMembershipOperation.LEAVE_GROUP);
            leave.withTimeout(Duration.ofSeconds(20));
            Runtime.getRuntime().addShutdownHook(new Thread(() -> streams.close(leave)));
            streams.start();
            ended.await();
            System.exit(failed[0] ? 1 : 0);
        } catch (InterruptedException error) {
            Thread.currentThread().interrupt();
        }
    }

    private static Topology topology(Options options) {
        Topology topology = new Topology();
        topology.addSource(
            "transactions", Serdes.ByteArray().deserializer(), Serdes.ByteArray().deserializer(),
            options.text("transactions"));
        topology.addProcessor("decide", () -> new Decider(new Models(options)), "transactions");
        topology.addStateStore(store(Decider.CARDS, CardState.SERDE), "decide");
        topology.addStateStore(store(Decider.TERMINALS, DayTotals.SERDE), "decide");
        topology.addSink(
            "decisions", options.text("decisions"), Serdes.ByteArray().serializer(), Serdes.ByteArray().serializer(),
            "decide");
        return topology;
    }

    /** With a cache: Streams writes a changed key to the changelog once between two commits. */
    private static <V> StoreBuilder<KeyValueStore<Long, V>> store(String name, Serde<V> values) {
        return Stores.keyValueStoreBuilder(Stores.inMemoryKeyValueStore(name), Serdes.Long(), values)
            .withLoggingEnabled(Map.of())
            .withCachingEnabled();
    }

    private static Properties settings(Options options) {
        Properties settings = new Properties();
        settings.put(StreamsConfig.APPLICATION_ID_CONFIG, options.text("group"));
        settings.put(StreamsConfig.BOOTSTRAP_SERVERS_CONFIG, options.text("bootstrap"));
        settings.put(StreamsConfig.STATE_DIR_CONFIG, options.text("state"));
        settings.put(StreamsConfig.COMMIT_INTERVAL_MS_CONFIG, (long) (1e3 * options.number("commit-s", 5.0)));
        settings.put(StreamsConfig.STATESTORE_CACHE_MAX_BYTES_CONFIG, CACHE_BYTES);
        settings.put(StreamsConfig.consumerPrefix(ConsumerConfig.AUTO_OFFSET_RESET_CONFIG), "earliest");
        // Streams' default of 100 ms would be most of a decision's latency
        settings.put(StreamsConfig.producerPrefix(ProducerConfig.LINGER_MS_CONFIG), 5);
        settings.put(StreamsConfig.producerPrefix(ProducerConfig.BATCH_SIZE_CONFIG), 131_072);
        return settings;
    }
}
