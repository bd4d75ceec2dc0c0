package cascade.peers;

import java.util.Map;

/** The message of Cascade's decisions, field for field. */
record Decision(
    long transactionId,
    String decision,
    double score,
    String stage,
    double screenerScore,
    String bundle,
    boolean degraded,
    String degradedCause,
    String decisionId,
    boolean duplicate,
    String firstDecisionId,
    long eventTimeMs,
    long decisionTimeMs,
    Map<String, Double> latencyMs) {}
